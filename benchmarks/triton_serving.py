"""What Triton adds to scoring, beside scoring in process and beside what is often written by hand.

    python -m benchmarks.triton_serving [--quick] [--rounds 40]

One user, 500 candidates, a history of 50, one thread a scoring. Every round calls, one after another: the scorer in
process, the scorer `triton` over gRPC, `POST /v1/rank` of a gateway that scores itself, of one that asks Triton, and
the naive server (benchmarks/naive_server.py). Latencies are of wall time at the caller, `cpu` is processor time of all
processes that took part, a request. Then: what glibc's malloc settings save in Triton, p99 while row deltas are
written into the tables, requests a second and memory with one and with two instances.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from benchmarks.naive_server import candidates_of  # noqa: E402
from benchmarks.raw_http import Connection, free_port, wait_until_ready  # noqa: E402
from benchmarks.runs import CONFIGS  # noqa: E402
from benchmarks.served_bundle import ITEMS, USERS, make_bundle  # noqa: E402
from engine.bundle import Bundle  # noqa: E402
from engine.components import Scorer, ScoreRequest  # noqa: E402
from engine.inference.live_writer import LiveWriter  # noqa: E402
from engine.streaming.deltas.delta import Delta, TableRows  # noqa: E402
from plugins.scorers.inproc import InprocScorer  # noqa: E402
from plugins.scorers.triton import TritonScorer  # noqa: E402
from serving.triton.layout import live_root  # noqa: E402

CANDIDATES, HISTORY, BURST = 500, 50, 6
ROWS, EVERY, DENSE = 2400, 0.2, 5
"""As in benchmarks/delta_latency.py: rows a delta, seconds between two, deltas to one with the dense part."""
WORKERS = 8
LARGE = {"embedding": {"name": "hashing", "dim": 16, "options": {"rows": 1_000_000}}}
"""Tables of a million rows, 64 MB each."""
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "131072"}
"""glibc's own values: naming them also switches off that they adapt."""


@dataclass
class Times:
    """Of one kind of call: wall seconds; processor seconds of all processes over all of its bursts."""

    wall: list[float] = field(default_factory=list)
    cpu: float = 0.0
    calls: int = 0

    def p(self, share: float) -> float:
        return 1e3 * float(np.quantile(self.wall, share))

    @property
    def cpu_ms(self) -> float:
        return 1e3 * self.cpu / self.calls


@dataclass(frozen=True)
class Triton:
    """One that runs."""

    url: str
    pid: int
    repository: Path


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "", argv, extra={"--rounds": {"type": int, "default": 40, "help": "of all calls"}})
    report = Report("triton_serving", quick=options.quick)
    torch.set_num_threads(1)
    rounds = 4 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report.tell("training a bundle")
        bundle = make_bundle(folder / "model")
        _latency(report, bundle, folder / "one", rounds)
        _malloc(report, bundle, folder / "malloc", rounds)
        _instances(report, bundle, folder, 2.0 if options.quick else 10.0)
    return report.end()


# ------------------------------------------------------------------------------------------------ what is called
def _request(number: int) -> ScoreRequest:
    rng = np.random.default_rng(number)
    items = [str(i) for i in rng.choice(ITEMS, CANDIDATES, replace=False)]
    history = [str(i) for i in rng.choice(ITEMS, HISTORY, replace=False)]
    return ScoreRequest(user={"user_id": str(number % USERS)}, history={"item_id": history}, items=items)


def _latency(report: Report, bundle: Path, folder: Path, rounds: int) -> None:
    """In process, gRPC, HTTP and the naive server; then gRPC while deltas are written."""
    with ExitStack() as stack:
        report.tell("starting Triton, two gateways and the naive server")
        triton = stack.enter_context(running_triton(bundle, folder))
        here, there = InprocScorer(InprocScorer.Options(threads=1)), _client(triton.url)
        for scorer in (here, there):
            scorer.load(bundle)
            stack.callback(scorer.close)
        opened = Bundle.open(bundle)
        users = {user.user: user.features for user in opened.users()}
        requests = [_with_user(_request(n), users) for n in range(64)]
        gateways = {
            name: stack.enter_context(_gateway(bundle, folder / name, scorer))
            for name, scorer in (
                ("http", {"name": "inproc", "options": {"threads": 1}}),
                ("http_triton", {"name": "triton", "options": {"url": triton.url, "fallback": "none"}}),
            )
        }
        naive = stack.enter_context(_naive(bundle))
        processes = {"score": [], "grpc": [triton.pid], "http": [gateways["http"][1]]}
        processes |= {"http_triton": [gateways["http_triton"][1], triton.pid], "naive": [naive[1]]}
        calls = {
            "score": _cycled(here.score, requests),
            "grpc": _cycled(there.score, requests),
            **{name: _posts(stack, port, requests) for name, (port, _) in gateways.items()},
            "naive": _naive_posts(stack, naive[0], opened, requests),
        }
        _agree(here, there, calls, requests[0])
        times = {name: Times() for name in calls}
        for number in range(rounds):
            if number % 10 == 0:
                report.tell(f"round {number} of {rounds}")
            for name, call in calls.items():
                _burst(times[name], call, processes[name])
        _tell_latency(report, times)
        _tell_shares(report, calls, triton, gateways["http_triton"][1], 20 if rounds <= 4 else 300)
        _deltas(report, bundle, triton, calls["grpc"], 4 if rounds <= 4 else 12)


def _with_user(request: ScoreRequest, users: Mapping[str, Mapping[str, Any]]) -> ScoreRequest:
    return ScoreRequest({**users[request.user["user_id"]]}, request.history, request.items)


def _client(url: str) -> TritonScorer:
    return TritonScorer(TritonScorer.Options(url=url, fallback="none", timeout_ms=10_000))


def _cycled(call: Callable[[ScoreRequest], Any], requests: list[ScoreRequest]) -> Callable[[], Any]:
    turn = cycle(requests)
    return lambda: call(next(turn))


def _posts(stack: ExitStack, port: int, requests: list[ScoreRequest]) -> Callable[[], Any]:
    connection = Connection(port)
    stack.callback(connection.close)
    bodies = [
        {"user": r.user["user_id"], "items": r.items, "history": r.history["item_id"], "timeout_ms": 10_000}
        for r in requests
    ]
    posts = cycle([connection.request("/v1/rank", body) for body in bodies])
    return lambda: connection.send(next(posts))


def _naive_posts(stack: ExitStack, port: int, bundle: Bundle, requests: list[ScoreRequest]) -> Callable[[], Any]:
    connection = Connection(port)
    stack.callback(connection.close)
    catalogue = bundle.catalogue.table
    rows = {row["item_id"]: row for row in catalogue.select(["item_id", "year", "genres"]).to_pylist()}

    def item(name: str) -> dict[str, Any]:
        row = rows[name]
        genres = row["genres"].split("|") if isinstance(row["genres"], str) else row["genres"]
        return {"item_id": name, "year": row["year"], "genres": genres}

    posts = cycle(
        [
            connection.request("/score", candidates_of(r.user, r.history["item_id"], [item(name) for name in r.items]))
            for r in requests
        ]
    )
    return lambda: connection.send(next(posts))


def _agree(here: Scorer, there: Scorer, calls: Mapping[str, Callable[[], Any]], request: ScoreRequest) -> None:
    """All do the same work: the same scores, to float noise."""
    wanted = here.score(request).tasks["like"]
    np.testing.assert_allclose(there.score(request).tasks["like"], wanted, atol=1e-5)
    for name in ("http", "http_triton"):
        answer = json.loads(calls[name]())
        assert not answer["degraded"], answer["degraded"]
        by_item = {row["id"]: row["score"] for row in answer["items"]}
        np.testing.assert_allclose([by_item[item] for item in request.items], wanted, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(json.loads(calls["naive"]())["scores"], wanted, atol=1e-5, err_msg="naive")


def _burst(times: Times, call: Callable[[], Any], processes: list[int]) -> None:
    """The first call of a burst finds the caches as the calls before left them; it is not counted for the latency."""
    before, own = _cpu(processes), time.process_time()
    for number in range(BURST):
        begin = time.perf_counter()
        call()
        if number:
            times.wall.append(time.perf_counter() - begin)
    times.cpu += time.process_time() - own + _cpu(processes) - before
    times.calls += BURST


def _cpu(pids: list[int]) -> float:
    """Seconds of processor time of these processes and all under them."""
    total = 0.0
    for pid in pids:
        root = psutil.Process(pid)
        total += sum(_own_cpu(process) for process in (root, *root.children(recursive=True)))
    return total


def _own_cpu(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system


def _tell_latency(report: Report, times: Mapping[str, Times]) -> None:
    inproc, grpc, naive = times["score"], times["grpc"], times["naive"]
    report.line(
        "gRPC p50, ms",
        ours=grpc.p(0.5),
        peer=inproc.p(0.5),
        ratio=grpc.p(0.5) / inproc.p(0.5),
        target="<= in process + 2 ms",
        ok=grpc.p(0.5) <= inproc.p(0.5) + 2.0,
        extra_ms=grpc.p(0.5) - inproc.p(0.5),
    )
    report.line(
        "gRPC p99, ms",
        ours=grpc.p(0.99),
        peer=inproc.p(0.99),
        ratio=grpc.p(0.99) / inproc.p(0.99),
        target="<= 2 x in process",
        ok=grpc.p(0.99) <= 2 * inproc.p(0.99),
    )
    cost = {name: t.cpu_ms for name, t in times.items()}
    for name, value in cost.items():
        if name != "naive":
            report.line(
                f"processor time a request, ms: {name}",
                ours=value,
                peer=cost["naive"],
                ratio=cost["naive"] / value,
                target="naive >= 3 x ours",
                ok=cost["naive"] >= 3 * value,
                over_in_process=value - cost["score"],
                p50={"ours": times[name].p(0.5), "naive": naive.p(0.5)},
                p99={"ours": times[name].p(0.99), "naive": naive.p(0.99)},
            )


def _tell_shares(
    report: Report, calls: Mapping[str, Callable[[], Any]], triton: Triton, gateway: int, number: int
) -> None:
    """Where the processor time of a request goes: by process, milliseconds."""
    processes = psutil.Process(triton.pid).children(recursive=True)
    by_name = {
        "instance": [p for p in processes if "stub" in p.name()],
        "tritonserver": [p for p in processes if p.name().startswith("tritonserver")],
        "gateway": [psutil.Process(gateway)],
    }

    def spent() -> dict[str, float]:
        found = {name: sum(map(_own_cpu, its)) for name, its in by_name.items()}
        return {**found, "caller": time.process_time()}

    for name in ("grpc", "http_triton"):
        before = spent()
        for _ in range(number):
            calls[name]()
        shares = {part: 1e3 * (now - before[part]) / number for part, now in spent().items()}
        report.line(f"where processor time goes, ms a request: {name}", ours=sum(shares.values()), shares=shares)


# -------------------------------------------------------------------------------------------------------- deltas
def _deltas(report: Report, bundle: Path, triton: Triton, call: Callable[[], Any], rounds: int) -> None:
    report.tell("row deltas into the tables while requests come")
    taken: dict[str, list[float]] = {"quiet": [], "deltas": []}
    versions: set[str] = set()
    with _writing(bundle, triton) as (say, rows):
        for _ in range(rounds):
            for phase in taken:
                say(phase == "deltas")
                end = time.perf_counter() + 3.0
                while (begin := time.perf_counter()) < end:
                    answer = call()
                    taken[phase].append(time.perf_counter() - begin)
                    versions.add(answer.version)
        seconds = 3.0 * rounds
        rate = rows() / seconds
    p99 = {phase: 1e3 * float(np.quantile(found, 0.99)) for phase, found in taken.items()}
    report.line(
        "p99 over gRPC while deltas are written, ms",
        ours=p99["deltas"],
        peer=p99["quiet"],
        ratio=p99["deltas"] / p99["quiet"],
        target="<= 1.2 x quiet, at >= 10,000 rows/s",
        ok=p99["deltas"] <= 1.2 * p99["quiet"] and rate >= 10_000,
        rows_per_second=rate,
        versions=len(versions),
        requests={phase: len(found) for phase, found in taken.items()},
    )


@contextmanager
def _writing(bundle: Path, triton: Triton) -> Iterator[tuple[Callable[[bool], None], Callable[[], int]]]:
    """A process beside Triton that writes deltas, as `plexrank triton follow` does; on and off by call."""
    context = multiprocessing.get_context("spawn")
    on, end, rows = context.Event(), context.Event(), context.Value("q", 0)
    live = live_root(triton.repository) / Bundle.open(bundle, verify=False).name / "1"
    process = context.Process(target=_write, args=(bundle, live, on, end, rows), daemon=True)
    process.start()

    def say(write: bool) -> None:
        (on.set if write else on.clear)()
        time.sleep(2 * EVERY)

    try:
        yield say, lambda: int(rows.value)
    finally:
        end.set()
        process.join(timeout=20)


def _write(path: Path, live: Path, on: Event, end: Event, written: Any) -> None:
    bundle = Bundle.open(path)
    weights = bundle.frozen_tensors()
    tables = {n.removeprefix("embedding.weights."): w for n, w in weights.items() if n.startswith("embedding.weights.")}
    dense = {n: w for n, w in weights.items() if not n.startswith("embedding.")}
    rng, sequence = np.random.default_rng(1), 0
    sizes = np.array([len(w) for w in tables.values()])
    shares = np.maximum(1, ROWS * sizes // sizes.sum())
    with LiveWriter(live, bundle) as writer:
        while not end.is_set():
            begin = time.monotonic()
            if on.is_set():
                sequence += 1
                parts = {}
                for (name, weight), share in zip(tables.items(), shares, strict=True):
                    rows = np.sort(rng.choice(len(weight), min(int(share), len(weight)), replace=False))
                    parts[name] = TableRows(rows, weight[rows].numpy() * 1.0001)
                moved = {} if sequence % DENSE else {name: torch.clone(value) for name, value in dense.items()}
                now = time.time()
                writer.apply(Delta(bundle.name, bundle.version, 1, sequence, now, now, parts, moved))
                written.value += sum(len(part.rows) for part in parts.values())
            end.wait(max(0.0, EVERY - (time.monotonic() - begin)))


# ------------------------------------------------------------------------------------- malloc, instances, memory
def _malloc(report: Report, bundle: Path, folder: Path, rounds: int) -> None:
    report.tell("Triton with glibc's own malloc settings beside ours")
    requests = [_request(n) for n in range(64)]
    with ExitStack() as stack:
        found = {}
        for name, environment in (("ours", {}), ("glibc", GLIBC)):
            triton = stack.enter_context(running_triton(bundle, folder / name, environment=environment))
            scorer = _client(triton.url)
            scorer.load(bundle)
            stack.callback(scorer.close)
            found[name] = (_cycled(scorer.score, requests), triton.pid, Times())
        for _ in range(rounds):
            for call, pid, times in found.values():
                _burst(times, call, [pid])
    ours, glibc = found["ours"][2], found["glibc"][2]
    report.line(
        "processor time a request over gRPC, ms: malloc settings",
        ours=ours.cpu_ms,
        peer=glibc.cpu_ms,
        ratio=glibc.cpu_ms / ours.cpu_ms,
        p50={"ours": ours.p(0.5), "peer": glibc.p(0.5)},
    )


def _instances(report: Report, bundle: Path, folder: Path, seconds: float) -> None:
    """Requests a second from 8 threads, and what one more instance adds to the memory of all (proportional set size: a
    page that n processes share counts a nth for each), with small tables and with large."""
    report.tell("training a bundle with large tables")
    bundles = {"small tables": bundle, "large tables": make_bundle(folder / "large", LARGE)}
    rate, one_more, tables = {}, {}, {}
    for name, path in bundles.items():
        held = {}
        for count in (1, 2):
            report.tell(f"{name}: {count} instance(s), {WORKERS} threads")
            with running_triton(
                path, folder / f"instances-{count}-{path.parent.parent.name}", instances=count
            ) as triton:
                scorer = _client(triton.url)
                scorer.load(path)
                rate[name, count] = _throughput(scorer, seconds)
                scorer.close()
                stubs = [p for p in psutil.Process(triton.pid).children(recursive=True) if "stub" in p.name()]
                held[count] = sum(p.memory_full_info().pss for p in stubs) / 2**20
        one_more[name] = held[2] - held[1]
        weights = Bundle.open(path, verify=False).frozen_tensors()
        tables[name] = sum(t.nbytes for n, t in weights.items() if n.startswith("embedding.weights.")) / 2**20
    report.line(
        "requests a second, 2 instances",
        ours=rate["small tables", 2],
        peer=rate["small tables", 1],
        ratio=rate["small tables", 2] / rate["small tables", 1],
        cores=os.cpu_count(),
        threads=WORKERS,
    )
    extra = one_more["large tables"] - one_more["small tables"]
    report.line(
        "memory of one more instance, MiB: large tables over small",
        ours=extra,
        peer=tables["large tables"],
        ratio=extra / tables["large tables"],
        target="<= a tenth of the tables",
        ok=extra <= 0.1 * tables["large tables"],
        one_more=one_more,
        tables=tables,
    )


def _throughput(scorer: Scorer, seconds: float) -> float:
    requests = [_request(n) for n in range(64)]
    done = [0] * WORKERS
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        turn = cycle(requests[number:] + requests[:number])
        while time.perf_counter() < end:
            scorer.score(next(turn))
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / seconds


# ------------------------------------------------------------------------------------------------------- servers
@contextmanager
def running_triton(
    bundle: Path, folder: Path, *, instances: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Triton]:
    """Exports, starts, waits until it scored -> where it is; ends it."""
    repository, state = folder / "repository", folder / "state"
    plexrank = [sys.executable, "-W", "ignore", "-m", "engine"]
    export = ["export", "triton", str(bundle), str(repository), "--instances", str(instances)]
    subprocess.run([*plexrank, *export], check=True, stdout=subprocess.DEVNULL)
    up = [*plexrank, "triton", "up", str(repository), "--dir", str(state), "--detach", "--json"]
    up += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    done = subprocess.run(up, check=True, stdout=subprocess.PIPE, env={**os.environ, **(environment or {})})
    there = json.loads(done.stdout)
    try:
        yield Triton(there["url"], there["pid"], repository)
    finally:
        subprocess.run([*plexrank, "triton", "down", "--dir", str(state)], check=False, stdout=subprocess.DEVNULL)


@contextmanager
def _gateway(bundle: Path, folder: Path, scorer: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """-> its port and process id."""
    folder.mkdir(parents=True, exist_ok=True)
    source = CONFIGS / "movielens-100k.yaml"
    config = yaml.safe_load(source.read_text())
    config["serving"] = {**config.get("serving", {}), "scorer": dict(scorer), "log_rankings": False}
    file = folder / source.name
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "engine", "serve", str(bundle), "--config", str(file)]
    command += ["--port", str(port), "--state-dir", str(folder / "state"), "--log-level", "warning"]
    with _process(command, port) as pid:
        yield port, pid


@contextmanager
def _naive(bundle: Path) -> Iterator[tuple[int, int]]:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.naive_server", str(bundle), str(port)]
    with _process(command, port) as pid:
        yield port, pid


@contextmanager
def _process(command: list[str], port: int) -> Iterator[int]:
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(port, server)
        yield server.pid
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(main())
