"""What row deltas cost the answers: p99 of `POST /v1/rank` while they are applied, beside p99 while none come.

    python -m benchmarks.delta_latency [--quick] [--rounds 20]

A server of its own process ranks 500 items with a history of 50 over a kept connection. Stretches of a few seconds
without deltas and with them take turns, so that both meet the same noise. The deltas come through the server's own
log, from a process beside it, as a learner with its default settings sends them: a fifth of a second apart, 2,400 rows
of the tables each, and the whole dense part once a second: more than 10,000 rows a second. `control` is the same with
a process that makes the same deltas and does not publish them: what a neighbour on the second core costs by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.raw_http import Connection  # noqa: E402
from benchmarks.served_bundle import ITEMS, USERS, make_bundle  # noqa: E402
from benchmarks.serving import serving  # noqa: E402
from engine.bundle import Bundle  # noqa: E402
from engine.plugins import installed  # noqa: E402
from engine.streaming.deltas.delta import Delta, TableRows  # noqa: E402
from engine.streaming.deltas.publisher import DeltaPublisher  # noqa: E402
from engine.streaming.deltas.registry import ModelRegistry  # noqa: E402
from engine.streaming.events.open_log import open_log  # noqa: E402
from engine.streaming.learning.topics import STREAMS  # noqa: E402

ROWS, EVERY, DENSE = 2400, 0.2, 5
"""Rows a delta, the time between two (12,000 rows a second), and how many of them to one with the dense part."""
SECONDS, SHORT = 3.0, 0.5
"""A stretch."""
EPOCH = 1
PHASES = ("quiet", "control", "deltas")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "", argv, extra={"--rounds": {"type": int, "default": 20, "help": "of stretches"}})
    report = Report("delta_latency", quick=options.quick)
    rounds, seconds = (2, SHORT) if options.quick else (options.rounds, SECONDS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report.tell("training a bundle")
        bundle = make_bundle(folder / "model")
        registry = ModelRegistry(folder / "models")
        registry.publish(bundle, EPOCH, "benchmark")
        with serving(bundle, folder / "state", models=folder / "models") as port, _publisher(folder) as say:
            connection = Connection(port)
            posts = cycle(_posts(connection))
            for _ in range(50):
                connection.send(next(posts))
            taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
            versions: set[str] = set()
            for number in range(rounds):
                report.tell(f"round {number + 1} of {rounds}")
                for phase in PHASES:
                    say(phase)
                    taken[phase] += _stretch(connection, posts, seconds, versions if phase == "deltas" else set())
            rows = _applied(port)
            connection.close()
    _tell(report, taken, versions, rows, rounds * seconds)
    return report.end()


def _posts(connection: Connection) -> list[bytes]:
    rng = np.random.default_rng(3)
    items = [str(i) for i in rng.choice(ITEMS, 500, replace=False)]
    history = [str(i) for i in rng.choice(ITEMS, 50, replace=False)]
    body: dict[str, Any] = {"items": items, "history": history, "timeout_ms": 10_000}
    return [connection.request("/v1/rank", {"user": str(user), **body}) for user in range(USERS)]


def _stretch(connection: Connection, posts: Iterator[bytes], seconds: float, versions: set[str]) -> list[float]:
    """Seconds a request, sent one after another."""
    taken = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        answer = connection.send(next(posts))
        taken.append(time.perf_counter() - begin)
        found = json.loads(answer)
        assert not found["degraded"], found["degraded"]
        versions.add(found["model"]["version"])
    return taken[5:]


def _applied(port: int) -> int:
    """Rows that the server applied, from its metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("plexrank_delta_rows_sum")))


@contextmanager
def _publisher(folder: Path) -> Iterator[Any]:
    """A process that makes deltas; called with a phase it publishes them, or only makes them, or rests."""
    context = multiprocessing.get_context("spawn")
    making, sending, end = context.Event(), context.Event(), context.Event()
    process = context.Process(target=_publish, args=(folder, making, sending, end), daemon=True)
    process.start()

    def say(phase: str) -> None:
        (making.clear if phase == "quiet" else making.set)()
        (sending.set if phase == "deltas" else sending.clear)()
        time.sleep(2 * EVERY)

    try:
        yield say
    finally:
        end.set()
        process.join(timeout=20)


def _publish(folder: Path, making: Event, sending: Event, end: Event) -> None:
    """Values near those of the bundle, so that scores stay what they are, about."""
    registry = ModelRegistry(folder / "models")
    bundle = Bundle.open(registry.bundle("current"))
    plugins = installed()
    weights = bundle.frozen_tensors()
    tables = {n.removeprefix("embedding.weights."): w for n, w in weights.items() if n.startswith("embedding.weights.")}
    dense = {n: w for n, w in weights.items() if not n.startswith("embedding.")}
    rng = np.random.default_rng(1)
    log = open_log(plugins, bundle.config.serving.event_log, folder / "state", read_only=True)
    streams = [log.sibling(name, **STREAMS[name]) for name in ("deltas", "models")]
    publisher = DeltaPublisher(*streams, registry, dtype="float32")
    sizes = np.array([len(w) for w in tables.values()])
    shares = np.maximum(1, ROWS * sizes // sizes.sum())
    sequence = 0
    while not end.is_set():
        begin = time.monotonic()
        if making.is_set():
            rows = {
                name: np.sort(rng.choice(len(weight), min(int(share), len(weight)), replace=False))
                for (name, weight), share in zip(tables.items(), shares, strict=True)
            }
            parts = {name: TableRows(its, tables[name][its].numpy() * 1.0001) for name, its in rows.items()}
            moved = {} if sequence % DENSE else {name: torch.clone(value) for name, value in dense.items()}
            if sending.is_set():
                sequence += 1
                now = time.time()
                publisher.publish(Delta(bundle.name, bundle.version, EPOCH, sequence, now, now, parts, moved))
        end.wait(max(0.0, EVERY - (time.monotonic() - begin)))
    publisher.close()
    for stream in (*streams, log):
        stream.close()


def _tell(report: Report, taken: dict[str, list[float]], versions: set[str], rows: int, seconds: float) -> None:
    p99 = {phase: 1e3 * float(np.quantile(taken[phase], 0.99)) for phase in PHASES}
    p50 = {phase: 1e3 * float(np.quantile(taken[phase], 0.5)) for phase in PHASES}
    rate = rows / seconds
    report.line(
        "p99 of rank 500 with deltas",
        ours=p99["deltas"],
        peer=p99["quiet"],
        ratio=p99["deltas"] / p99["quiet"],
        target="<= 1.2 x quiet, at >= 10,000 rows/s",
        ok=p99["deltas"] <= 1.2 * p99["quiet"] and rate >= 10_000,
        control=p99["control"],
        p50=p50,
        requests={phase: len(taken[phase]) for phase in PHASES},
        rows_per_second=rate,
        versions=len(versions),
    )


if __name__ == "__main__":
    sys.exit(main())
