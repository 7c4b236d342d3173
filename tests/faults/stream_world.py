"""A server, a learner and a broker, each a process of its own, around the small film world; and what adds up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from engine.bundle import Bundle
from engine.components import LogRecord
from engine.config import Config
from engine.hashing import fingerprint
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.audit import RECORD
from engine.streaming.learning.checkpointing import beside
from plugins.events.kafka import KafkaEventLog
from tests.brokers import Broker, free_port
from tests.streaming.film_stream import Stream, ranking

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
MODEL = "tiny"
LEARNING: dict[str, Any] = {
    "join": {"window_seconds": 2.0, "lateness_seconds": 1.0, "idle_seconds": 1.0},
    "batch_size": 32,
    "chunk": 50,
    "checkpoint_seconds": 0.4,
    "max_delay_seconds": 0.05,
    "retrieval": False,
    "publish": {"interval_seconds": 0.05, "dense_seconds": 0.1, "bundle_seconds": 1000},
    "guard": {"logloss_ratio": None, "auc_drop": None, "calibration": None},
}


def until(true: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


class Zygote:
    """What forks the processes (`stream_zygote`)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.stream_zygote"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


class Run:
    """A `plexrank` command that runs."""

    def __init__(self, zygote: Zygote, arguments: Sequence[str], folder: Path, name: str, clock: Path | None) -> None:
        self._zygote, self.output, self.errors = zygote, folder / f"{name}.out", folder / f"{name}.err"
        self.pid: int = zygote.ask(
            start=list(arguments),
            output=str(self.output),
            errors=str(self.errors),
            clock=None if clock is None else str(clock),
        )["pid"]

    @property
    def code(self) -> int | None:
        """Exit status; None while it runs."""
        found: int | None = self._zygote.ask(ended=self.pid)["code"]
        return found

    def said(self) -> str:
        return self.errors.read_text(errors="replace") if self.errors.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self.code is None:
            self.signal(signal.SIGKILL)
            until(lambda: self.code is not None, "it is dead")

    def wait(self) -> int:
        until(lambda: self.code is not None, f"it ends: {self.said()[-2000:]}")
        code = self.code
        assert code is not None
        return code


class LearnerRun(Run):
    """`plexrank learn`."""

    metrics: int

    def events(self) -> int:
        """Events that it has read, those of the checkpoint that it goes on from included."""
        return int(self.metric("plexrank_learner_events_total"))

    def metric(self, name: str) -> float:
        """Over all labels; 0 while it does not answer."""
        try:
            text = httpx.get(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5).text
        except httpx.HTTPError:
            return 0.0
        return _metric(text, name)

    def end(self) -> dict[str, Any]:
        """SIGTERM -> its counts."""
        self.signal(signal.SIGTERM)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        assert self.wait() == 0, self.said()[-3000:]
        found: dict[str, Any] = json.loads(self.output.read_text().splitlines()[-1])
        return found

    def disk(self, most: int) -> None:
        """The longest file that it can write, in bytes; -1: any. It stands for a disk that is full."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most, hard))


class ServerRun(Run):
    """`plexrank serve`, and a client of it."""

    client: httpx.Client

    def metric(self, name: str) -> float:
        return _metric(self.client.get("/metrics").text, name)


def _metric(text: str, name: str) -> float:
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


class World:
    """One topic, one registry, one state directory for the server, one for the learners."""

    def __init__(
        self,
        zygote: Zygote,
        bundle: Path,
        folder: Path,
        broker: Broker,
        partitions: int,
        client: str = "kafka",
        **learning: Any,
    ):
        """client: the event log of the processes; the test's own is always `kafka`."""
        self.zygote, self.bundle, self.folder, self.broker = zygote, bundle, folder, broker
        self.topic = f"stream-{uuid.uuid4().hex[:12]}"
        broker.make_topic(self.topic, partitions)
        options = {
            "topic": self.topic,
            "partitions": partitions,
            "timeout_ms": 1500,
            "session_timeout_ms": 2000,
            **broker.options,
        }
        whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json", exclude_defaults=True)
        whole["serving"]["event_log"] = {"name": client, "options": options}
        whole["learning"] = {**LEARNING, **learning}
        Config.model_validate(whole)
        self.config = folder / "films.yaml"
        self.config.write_text(yaml.safe_dump(whole))
        self.log = KafkaEventLog(KafkaEventLog.Options.model_validate({**options, "timeout_ms": 5000}))
        self.log.ends()  # makes it
        self.registry = ModelRegistry(folder / "models", MODEL)
        self._runs: list[Run] = []

    # ------------------------------------------------------------------------------------------- processes
    def serve(self) -> ServerRun:
        """Returns when it answers."""
        self.registry.current() or self.registry.publish(self.bundle, 1, "begun")
        port = free_port()
        arguments = ["serve", "--models", str(self.registry.root), "--config", str(self.config), "--port", str(port)]
        state = ["--state-dir", str(self.folder / "server"), "--log-level", "warning"]
        run = ServerRun(self.zygote, [*arguments, *state], self.folder, f"server-{len(self._runs)}", None)
        self._runs.append(run)
        run.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        until(lambda: _answers(run.client) or run.code is not None, "the server answers")
        assert run.code is None, run.said()[-3000:]
        return run

    def learn(
        self, *more: str, out: str = "out", publish: bool = False, end: bool = False, clock: Path | None = None
    ) -> LearnerRun:
        """A learner; it may not have begun to read on return. end: of the log as it is now, then it stops."""
        port = free_port()
        place = ["--models", str(self.registry.root)] if publish else ["--bundle", str(self.bundle)]
        arguments = [
            "learn", str(self.config), *place, "--state-dir", str(self.folder / "learners"), "--json",
            "--out", str(self.folder / out), "--audit", str(self.audit(out)), "--metrics-port", str(port),
            "--until", "end" if end else "live", *more,
        ]  # fmt: skip
        run = LearnerRun(self.zygote, arguments, self.folder, f"learner-{len(self._runs)}", clock)
        run.metrics = port
        self._runs.append(run)
        return run

    def command(self, *arguments: str) -> Run:
        """Another `plexrank` command."""
        run = Run(self.zygote, arguments, self.folder, f"command-{len(self._runs)}", None)
        self._runs.append(run)
        return run

    def forget(self, run: Run) -> None:
        """It was to fail."""
        self._runs.remove(run)

    def audit(self, out: str = "out") -> Path:
        return self.folder / f"{out}.audit"

    def clock(self, name: str = "clock") -> Path:
        """A clock for `learn`, right for now."""
        path = self.folder / name
        path.write_bytes(struct.pack("d", 0.0))
        return path

    def close_windows(self, seconds: float) -> None:
        """A last ranking in each partition, of one film, at a time that is long after the others: all windows end."""
        left, number = set(self.log.ends()), 0
        while left:
            key = f"last{number}"
            ((partition, _),) = self.log.append([(key, ranking(key, key, ["1"], seconds))])
            left.discard(partition)
            number += 1

    def close(self) -> None:
        for run in self._runs:
            run.kill()
        self.log.close()

    # -------------------------------------------------------------------------------------------- the log
    def records(self, name: str | None = None) -> list[LogRecord]:
        """All of the topic, or of one beside it."""
        log = self.log if name is None else self.log.sibling(name)
        try:
            return [r for partition, at in log.begins().items() for r in log.read({partition: at}, 1_000_000)]
        finally:
            if name is not None:
                log.close()

    def until(self, true: Callable[[], Any], what: str) -> None:
        """Waits; gives up where a process has failed."""

        def settled() -> bool:
            failed = [run for run in self._runs if run.code not in (None, 0, -signal.SIGKILL)]
            assert not failed, f"before {what}: {failed[0].said()[-3000:]}"
            return bool(true())

        until(settled, f"{what}: {[run.said()[-1000:] for run in self._runs]}")

    def consumed(self, learners: Sequence[LearnerRun]) -> None:
        """Waits until the learners, with their earlier lives, have read the whole log and trained what they joined."""
        whole = sum(self.log.ends().values())
        self.until(
            lambda: sum(r.events() for r in learners) >= whole and not sum(r.metric(_WAITING) for r in learners),
            f"{whole} events are read",
        )


_WAITING = "plexrank_learner_waiting"


def _answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return client.get("/health/live").status_code == 200
    return False


def turn_clock(path: Path, seconds: float) -> None:
    """Sets by how much a clock is wrong."""
    with path.open("r+b") as file:
        file.write(struct.pack("d", seconds))


class Visitors:
    """A thread that asks for rankings and clicks on some films, until it is told to stop; it remembers all answers."""

    def __init__(self, server: ServerRun, name: str, pause: float = 0.004) -> None:
        self.server, self.name, self._pause = server, name, pause
        self.answers: list[dict[str, Any]] = []
        self.clicks: list[tuple[str, str, str]] = []  # event id, request id, item; answered as taken
        self.receipts: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._rng = np.random.default_rng(17)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Visitors:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, count: int, what: str = "visitors go on") -> None:
        """Waits for that many more answers."""
        goal = len(self.answers) + count
        until(lambda: len(self.answers) >= goal or not self._thread.is_alive(), what)
        assert self._thread.is_alive(), self.failures

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self._visit(len(self.answers))
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                return

    def _visit(self, number: int) -> None:
        user = f"u{number % 7}"
        items = [str(item) for item in self._rng.choice(30, 5, replace=False)]
        response = self.server.client.post("/v1/rank", json={"user": user, "items": items})
        assert response.status_code == 200, response.text
        answer = response.json()
        self.answers.append(answer)
        liked = [i for i in items if self._rng.random() < (0.8 if int(i) % 3 == number % 3 else 0.1)]
        if not liked:
            return
        events = [click(f"{self.name}-{number}-{i}", user, i, answer["request_id"]) for i in liked]
        response = self.server.client.post("/v1/events", json=events)
        assert response.status_code == 202, response.text
        receipts = response.json()["events"]
        for item, receipt in zip(liked, receipts, strict=True):
            assert receipt["status"] == "accepted", receipt
            self.receipts.append(receipt)
            self.clicks.append((receipt["id"], answer["request_id"], item))


def click(name: str, user: str, item: str, request: str, **more: Any) -> dict[str, Any]:
    data = {"type": "click", "user": user, "item": item, "ranking": request}
    return {"id": name, "source": "visitors", "specversion": "1.0", "type": "interaction", "data": data, **more}


# ----------------------------------------------------------------------------------------------- what adds up
def adds_up(summary: dict[str, Any]) -> None:
    """Of one learner: each event has one outcome, each example is trained or waits, each impression has one fate."""
    events, examples, join = summary["events"], summary["examples"], summary["join"]
    assert events["in"] == sum(n for name, n in events.items() if name != "in")
    assert examples["joined"] == examples["trained"] + examples["waiting"]
    assert examples["trained"] == examples["positive"] + examples["negative"] + examples["correction"]
    fates = sum(join[f"liked.{what}"] for what in ("positives", "negatives", "thinned"))
    assert join["impressions"] == fates + summary["open"]["liked"]
    known = ("joined", "repeats", "late", "orphans", "foreign", "unattributed", "irrelevant")
    assert join["interactions"] == sum(join[what] for what in known) + summary["open"]["interactions"]


def trained(*audits: Path) -> Counter[tuple[int, int, int]]:
    """(request, item, kind) -> how often it was trained."""
    records = np.concatenate([np.fromfile(audit, RECORD) for audit in audits])
    return Counter(zip(*(records[name].tolist() for name in ("request", "item", "kind")), strict=True))


def each_once(counted: Counter[tuple[int, int, int]]) -> None:
    """No example twice; an impression is a positive or a negative, never both (a correction may follow a negative)."""
    assert max(counted.values(), default=1) == 1
    first = Counter((request, item) for request, item, kind in counted if kind != 2)
    assert max(first.values(), default=1) == 1


def liked(counted: Counter[tuple[int, int, int]]) -> set[tuple[int, int]]:
    """(request, item) of what was trained as positive, in time or, on a machine that stood still, late."""
    return {(request, item) for request, item, kind in counted if kind != 1}


def fates(stream: Stream) -> dict[tuple[int, int], int]:
    """(request, item) -> kind of the one example that it must become: 0 liked, 1 not."""
    shown = dict.fromkeys(named(stream.shown), 1)
    return {**shown, **dict.fromkeys(named([*stream.liked]), 0)}


def held(its: World, name: str) -> dict[str, int]:
    """What a member's newest checkpoint answers for."""
    saved = beside(its.folder / name / "checkpoints")
    return {} if saved is None else saved.state["positions"]


def named(pairs: Sequence[tuple[str, str]]) -> set[tuple[int, int]]:
    """(request, item) as an audit has them."""
    return {(fingerprint(request), fingerprint(item)) for request, item in pairs}


def decoded(records: Sequence[LogRecord], kind: str) -> list[dict[str, Any]]:
    """The events of one kind, in the order of the records; copies of one (source, id) once."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        event = json.loads(record.value)
        if event["type"] == kind:
            found.setdefault((event["source"], event["id"]), event)
    return list(found.values())


def never_back(versions: Sequence[str]) -> int:
    """Versions base+epoch.sequence, or base, in the order of the answers: a chain only goes on. Where the bundle itself
    comes back, the chain before it was left, and the next one is of a later epoch. -> How often it came back."""
    newest: dict[str, tuple[int, int]] = {}
    back = 0
    for version in versions:
        base, _, chain = version.partition("+")
        epoch, sequence = newest.get(base, (0, 0))
        if chain:
            place = (int(chain.split(".")[0]), int(chain.split(".")[1]))
            assert place >= (epoch, sequence), version
            newest[base] = place
        elif sequence:
            newest[base] = (epoch + 1, 0)
            back += 1
    return back


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def world(zygote: Zygote, tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes worlds: broker, partitions, what differs in `learning`."""
    made: list[World] = []

    def make(broker: Broker, partitions: int = 2, **learning: Any) -> World:
        folder = tmp_path / f"world-{len(made)}"
        folder.mkdir()
        made.append(World(zygote, tiny_bundle, folder, broker, partitions, **learning))
        return made[-1]

    yield make
    for its in made:
        its.close()
