"""What serving costs beside the bare network: 100 to 2,000 candidates, 50 items of history, one thread.

    python -m benchmarks.serving_latency [--quick] [--rounds 40]

Every round calls, one after another: the bare network (as its papers write it, and folded: the strongest form known),
the scorer, the whole pipeline in process, and `POST /v1/rank` of a server of its own process over a connection that is
kept. So all of them meet the same noise; where other work shares the processor, wall time says more of the scheduler
than of the calls, and processor time decides. `ours` and `peer` are medians in milliseconds of wall time, `cpu` beside
them of processor time. The folded network is the peer; `textbook` says what the other takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.bare.ranker import BareFolded, BareRanker, rows_of  # noqa: E402
from benchmarks.raw_http import Connection, free_port, wait_until_ready  # noqa: E402
from benchmarks.served_bundle import ITEMS, USERS, make_bundle  # noqa: E402
from engine.bundle import Bundle  # noqa: E402
from engine.components import ScoreRequest  # noqa: E402
from engine.deadline import Deadline  # noqa: E402
from engine.pipeline import Query  # noqa: E402
from serving.service import Service  # noqa: E402

SIZES, HISTORY = (100, 500, 1000, 2000), 50
BURST = 4
"""Calls of one kind in a row, so that each also meets its own data in the cache; the first is not counted."""
QUIET = 1.1
"""Wall time of the bare network over its processor time, up to which nothing else is at work."""
PATIENCE_MS = 10_000
"""A deadline that no call on a busy machine exceeds: what is measured is the work."""


@dataclass
class Times:
    """Of one kind of call, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def p(self, share: float) -> float:
        """A quantile of the wall time in milliseconds."""
        return 1e3 * float(np.quantile(self.wall, share))

    @property
    def p50(self) -> float:
        return 1e3 * median(self.wall)

    @property
    def cpu50(self) -> float:
        return 1e3 * median(self.cpu)


@dataclass
class Case:
    """Calls for one number of candidates."""

    size: int
    calls: dict[str, Callable[[], Any]]
    times: dict[str, Times]


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "", argv, extra={"--rounds": {"type": int, "default": 60, "help": "of all calls"}})
    report = Report("serving_latency", quick=options.quick)
    torch.set_num_threads(1)
    rounds = min(options.rounds, 5) if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        report.tell("training a bundle")
        bundle = make_bundle(Path(scratch) / "model")
        service = Service.open(bundle, None, Path(scratch) / "here")
        port = free_port()
        server = _serve(bundle, Path(scratch) / "there", port)
        try:
            wait_until_ready(port, server)
            connection = Connection(port)
            cases = [_case(size, _users(n), bundle, service, connection) for n, size in enumerate(SIZES)]
            for number in range(rounds):
                if number % 10 == 0:
                    report.tell(f"round {number} of {rounds}")
                for case in cases:
                    _measure(case)
            spent = {case.size: _server_cpu(server.pid, case.calls["http"]) for case in cases}
            connection.close()
        finally:
            server.terminate()
            server.wait(timeout=30)
            service.close()
    _tell(report, cases, spent)
    return report.end()


def _serve(bundle: Path, state: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "engine", "serve", str(bundle)]
    options = ["--port", str(port), "--state-dir", str(state), "--log-level", "warning"]
    return subprocess.Popen(command + options, stderr=subprocess.DEVNULL)


def _case(size: int, users: list[str], path: Path, service: Service, connection: Connection) -> Case:
    """The same candidates and history for all; what the calls answer for the first user is compared first. Then each
    call that a server gets is of the next user."""
    rng = np.random.default_rng(size)
    items = [str(i) for i in rng.choice(ITEMS, size, replace=False)]
    history = [str(i) for i in rng.choice(ITEMS, HISTORY, replace=False)]
    opened = Bundle.open(path)
    user = {**service.store.get(users[0]).features, "user_id": users[0]}
    request = ScoreRequest(user=user, history={"item_id": history}, items=items)
    rows, textbook, folded = rows_of(opened, request), BareRanker(path), BareFolded(path)
    body = {"items": items, "history": history, "timeout_ms": PATIENCE_MS}
    posts = [connection.request("/v1/rank", {"user": user, **body}) for user in users]
    in_process, through_http = cycle(users), cycle(posts)

    def rank() -> Any:
        query = Query("benchmark", Deadline(PATIENCE_MS / 1e3), next(in_process), history)
        return service.rank(query, items, {})

    calls: dict[str, Callable[[], Any]] = {
        "textbook": lambda: textbook(rows),
        "folded": lambda: folded(rows),
        "score": lambda: service.scorer.score(request),
        "rank": rank,
        "http": lambda: connection.send(next(through_http)),
    }
    _agree(calls, opened, items)
    return Case(size, calls, {name: Times() for name in calls})


def _users(number: int) -> list[str]:
    """Each case has users of its own."""
    share = USERS // len(SIZES)
    return [str(user) for user in range(number * share, (number + 1) * share)]


def _agree(calls: dict[str, Callable[[], Any]], bundle: Bundle, items: list[str]) -> None:
    """All give the same scores, to float noise: the bare network does all of the work that it is compared with."""
    calibrate = bundle.calibration["like"].apply
    wanted = calibrate(calls["textbook"]())
    answered, in_process = json.loads(calls["http"]()), calls["rank"]()
    by_item = {row["id"]: row["score"] for row in answered["items"]}
    assert not answered["degraded"]
    assert not in_process.degraded
    found = {
        "folded": calibrate(calls["folded"]()),
        "score": calls["score"]().tasks["like"],
        "rank": [dict(zip(in_process.items, in_process.scores, strict=True))[i] for i in items],
        "http": [by_item[i] for i in items],
    }
    for name, scores in found.items():
        np.testing.assert_allclose(scores, wanted, atol=1e-5, err_msg=name)


def _measure(case: Case) -> None:
    for name, call in case.calls.items():
        for number in range(BURST):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if number:
                case.times[name].cpu.append(time.process_time() - cpu)
                case.times[name].wall.append(time.perf_counter() - wall)


def _server_cpu(pid: int, call: Callable[[], Any], calls: int = 100) -> float:
    """Milliseconds of processor time that the server spends a request, all its threads."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    for _ in range(calls):
        call()
    after = process.cpu_times()
    return 1e3 * (after.user + after.system - before.user - before.system) / calls


def _tell(report: Report, cases: list[Case], spent: dict[int, float]) -> None:
    """Judged by wall time where the machine is quiet, else by processor time."""
    folded = [case.times["folded"] for case in cases]
    busy = max(t.p50 / t.cpu50 for t in folded) > QUIET
    by = "processor time: the machine is busy with other work" if busy else "wall time"
    for case in cases:
        t = case.times
        judged = case.size == 500
        more: dict[str, Any] = {"judged_by": by, "candidates": case.size, "history": HISTORY}
        for name in ("score", "rank"):
            wall, cpu = t[name].p50 / t["folded"].p50, t[name].cpu50 / t["folded"].cpu50
            report.line(
                f"{name} {case.size}",
                ours=t[name].p50,
                peer=t["folded"].p50,
                ratio=wall,
                target="<= 1.3 x folded" if judged else None,
                ok=(cpu if busy else wall) <= 1.3 if judged else None,
                cpu={"ours": t[name].cpu50, "peer": t["folded"].cpu50, "ratio": cpu},
                textbook=t["textbook"].p50,
                ratio_to_textbook=t[name].p50 / t["textbook"].p50,
                p99=t[name].p(0.99),
                **more,
            )
        extra, extra_cpu = t["http"].p50 - t["rank"].p50, spent[case.size] - t["rank"].cpu50
        report.line(
            f"http {case.size}",
            ours=t["http"].p50,
            peer=t["rank"].p50,
            ratio=t["http"].p50 / t["rank"].p50,
            target="<= 2 ms more" if judged else None,
            ok=(extra_cpu if busy else extra) <= 2.0 if judged else None,
            extra_ms=extra,
            cpu={"server": spent[case.size], "peer": t["rank"].cpu50, "extra": extra_cpu},
            p99=t["http"].p(0.99),
            **more,
        )
    costs: dict[str, Callable[[Case], float]] = {
        "rank": lambda case: case.times["rank"].cpu50 if busy else case.times["rank"].p50,
        "http": lambda case: spent[case.size] if busy else case.times["http"].p50,
    }
    for name, cost in costs.items():
        each = {case.size: 1e3 * cost(case) / case.size for case in cases}
        report.line(
            f"{name}: microseconds a candidate",
            ours=each,
            peer={case.size: 1e3 * case.times["folded"].cpu50 / case.size for case in cases},
            ratio=each[SIZES[-1]] / each[SIZES[0]],
            target="2,000 <= 1.1 x 100",
            ok=each[SIZES[-1]] <= 1.1 * each[SIZES[0]],
            judged_by=by,
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
