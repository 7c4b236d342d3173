"""How soon an event shows: in the user's next answer, and in the model that everybody is answered with.

    python -m benchmarks.freshness [--quick] [--seconds 60] [--rate 2000]

All of it on this machine, each in a process of its own: a Kafka-protocol broker, a server, a learner, and one that
sends 2,000 events a second to the log (rankings of five items, and clicks on them). Beside that load a prober, over
HTTP, ten times a second:
* state: posts a click of a user and ranks for that user, until the answer's history begins with it: time from the post
  to that answer;
* model: ranks, posts a click on what was shown, and asks for the served version until its newest event is not older
  than that click: the click was joined, trained, published as a delta and applied. The log has one partition, so what
  came before the newest event in it was trained, too.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402

from benchmarks.broker import broker, kafka, options  # noqa: E402
from benchmarks.raw_http import Connection  # noqa: E402
from benchmarks.served_bundle import ITEMS, USERS, make_bundle  # noqa: E402
from benchmarks.serving import serving  # noqa: E402
from engine.plugins import installed  # noqa: E402

TOPIC = "freshness.events"
SHOWN, TICK = 5, 0.02
LEARNING = {
    "join": {"window_seconds": 10.0, "lateness_seconds": 1.0},
    "max_delay_seconds": 0.05,
    "publish": {"interval_seconds": 0.2, "dense_seconds": 0.2},
    "guard": {"logloss_ratio": None, "auc_drop": None, "calibration": None},  # clicks here are drawn without taste
}
PATIENCE = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    more: dict[str, dict[str, Any]] = {
        "--seconds": {"type": float, "default": 60.0, "help": "of probing"},
        "--rate": {"type": int, "default": 2000, "help": "events a second"},
    }
    chosen = arguments(__doc__ or "", argv, extra=more)
    report = Report("freshness", quick=chosen.quick)
    seconds = 5.0 if chosen.quick else chosen.seconds
    with tempfile.TemporaryDirectory() as scratch, broker() as address:
        folder = Path(scratch)
        report.tell("training a bundle")
        bundle = make_bundle(folder / "model")
        config = _config(bundle, address, folder)
        models, state = folder / "models", folder / "state"
        with (
            _learner(config, bundle, models, state) as learner,
            serving(bundle, state, models=models, config=config) as port,
            _load(address, chosen.rate) as load,
        ):
            report.tell(f"probing for {seconds:.0f} s at {chosen.rate:,} events a second")
            time.sleep(1.0 if chosen.quick else 15.0)  # until windows end as fast as they begin
            spent, sent, began = _spent(learner.pid), load(), time.monotonic()
            by_state, by_model, lost = _probe(port, seconds)
            took = time.monotonic() - began
            cores = {name: (now - spent[name]) / took for name, now in _spent(learner.pid).items()}
            rate = (load() - sent) / took
    _tell(report, by_state, by_model, lost, rate, cores)
    return report.end()


def _config(bundle: Path, address: str, folder: Path) -> Path:
    tree = yaml.safe_load((bundle / "config.yaml").read_text())
    log = {"name": "kafka", "options": options(address, topic=TOPIC, partitions=1)}
    tree["serving"] |= {"event_log": log, "limits": {"timeout_ms": 2000}}
    tree["learning"] = LEARNING
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def _learner(config: Path, bundle: Path, models: Path, state: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-W", "ignore", "-m", "engine", "learn", str(config), "--bundle", str(bundle)]
    command += ["--models", str(models), "--state-dir", str(state), "--out", str(state / "learner")]
    command += ["--reset-to", "latest", "--json"]
    learner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while not list(models.glob("*/current.json")):
            if learner.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"the learner did not begin: {learner.stderr.read().decode() if learner.stderr else ''}"
                )
            time.sleep(0.1)
        yield learner
    finally:
        learner.terminate()
        learner.wait(timeout=60)


@contextmanager
def _load(address: str, rate: int) -> Iterator[Any]:
    """A process that sends; called, it says how many it has sent."""
    context = multiprocessing.get_context("spawn")
    end, sent = context.Event(), context.Value("q", 0)
    process = context.Process(target=_send, args=(address, rate, end, sent), daemon=True)
    process.start()

    try:
        yield lambda: int(sent.value)
    finally:
        end.set()
        process.join(timeout=20)


def _send(address: str, rate: int, end: Event, sent: Any) -> None:
    """Half rankings, half clicks on what the ranking before showed."""
    log = kafka(installed(), address, topic=TOPIC, partitions=1)
    rng = np.random.default_rng(5)
    pages = max(1, round(rate * TICK / 2))
    start, number = time.monotonic(), 0
    while not end.is_set():
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        users = rng.integers(0, USERS, pages).astype(str).tolist()
        items = rng.integers(0, ITEMS, (pages, SHOWN)).astype(str).tolist()
        past = rng.integers(0, ITEMS, (pages, 20)).astype(str).tolist()
        events = []
        for user, shown, history in zip(users, items, past, strict=True):
            request = uuid.uuid4().hex
            data = {"request_id": request, "user": user, "items": [{"id": i} for i in shown], "history": history}
            data["user_features"] = {"user_id": user, "age": 30, "gender": "F", "occupation": "artist"}
            events.append((user, _event(request, "ranking", now, data)))
            click = {"type": "click", "user": user, "item": shown[0], "ranking": request}
            events.append((user, _event(f"{request}-c", "interaction", now, click)))
        log.append(events)
        sent.value += len(events)
        number += 1
        end.wait(max(0.0, start + number * TICK - time.monotonic()))
    log.close()


def _event(name: str, kind: str, moment: str, data: dict[str, Any]) -> bytes:
    return msgspec.json.encode(
        {"specversion": "1.0", "id": name, "source": "load", "type": kind, "time": moment, "data": data}
    )


def _probe(port: int, seconds: float) -> tuple[list[float], list[float], int]:
    """-> (seconds to the user's changed answer, seconds to the model that contains the click, probes in vain)."""
    rng = np.random.default_rng(9)
    connection = Connection(port)
    by_state: list[float] = []
    by_model: list[float] = []
    lost = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        user = str(rng.integers(USERS))
        items = rng.choice(ITEMS, 50, replace=False).astype(str).tolist()
        shown = json.loads(connection.send(connection.request("/v1/rank", {"user": user, "items": items})))
        known = {
            visit["item"] for visit in _get(port, f"/v1/users/{user}")["history"]
        }  # one that is there already changes little
        item = next(row["id"] for row in shown["items"] if row["id"] not in known)
        click = {"type": "click", "user": user, "item": item, "ranking": shown["request_id"]}
        begin, moment = time.perf_counter(), time.time()
        event = _event(uuid.uuid4().hex, "interaction", datetime.fromtimestamp(moment, UTC).isoformat(), click)
        _post(port, event)
        again = json.loads(connection.send(connection.request("/v1/rank", {"user": user, "items": items})))
        taken = time.perf_counter() - begin
        before, after = ({row["id"]: row["score"] for row in answer["items"]} for answer in (shown, again))
        newest = _get(port, f"/v1/users/{user}")["history"][0]["item"]
        if before != after or newest == item:  # one that the model never saw adds nothing
            by_state.append(taken)
        else:
            lost += 1
        until = time.monotonic() + PATIENCE
        while (trained := _newest(port)) is None or trained < moment:
            if time.monotonic() > until:
                lost += 1
                break
            time.sleep(0.005)
        else:
            by_model.append(time.perf_counter() - begin)
        time.sleep(float(rng.uniform(0.0, 0.1)))
    connection.close()
    return by_state, by_model, lost


def _post(port: int, event: bytes) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/events", event, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        answer.read()


def _get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
        return json.load(answer)


def _newest(port: int) -> float | None:
    """Time of the newest event that the served model was trained on."""
    following = _get(port, "/v1/models")["following"]
    age = following and following["newest_event_age_seconds"]
    return None if age is None else time.time() - age


def _spent(learner: int) -> dict[str, float]:
    """Processor seconds so far: the learner, and everything on this machine."""
    machine = psutil.cpu_times()
    whole = machine.user + machine.system
    its = psutil.Process(learner).cpu_times()
    return {"learner": its.user + its.system, "machine": whole}


def _tell(
    report: Report,
    by_state: list[float],
    by_model: list[float],
    lost: int,
    rate: float,
    cores: dict[str, float],
) -> None:
    for name, taken, limit in (("state", by_state, 50.0), ("model", by_model, 1000.0)):
        p50, p99 = (1e3 * float(np.quantile(taken, q)) if taken else None for q in (0.5, 0.99))
        report.line(
            f"click posted -> {name}, p99 in milliseconds",
            ours=p99,
            peer=limit,
            ratio=None if p99 is None else p99 / limit,
            target=f"< {limit:,.0f} ms",
            ok=p99 is not None and p99 < limit and not lost,
            p50=p50,
            worst=1e3 * max(taken, default=float("nan")),
            probes=len(taken),
            in_vain=lost,
            events_a_second=rate,
            cores=cores,
        )


if __name__ == "__main__":
    sys.exit(main())
