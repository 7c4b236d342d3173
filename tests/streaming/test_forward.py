"""A log that goes away and comes back: nothing is lost, a key's order is kept, and what waits is bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_log import MemoryLog

from engine.components import EventLog, LogRecord
from engine.config import ComponentConfig, default_name
from engine.errors import EventError, LogUnavailable
from engine.plugins import installed
from engine.served import component
from engine.streaming.events.forward import WAITING, ForwardingLog
from engine.streaming.events.spool import Spool


def default_log(folder: Path) -> EventLog:
    use = ComponentConfig(name=default_name("event_logs"), options={"path": str(folder)})
    log: EventLog = component(installed(), "event_logs", use)
    return log


def event(key: str, n: int) -> tuple[str, bytes]:
    return key, json.dumps({"key": key, "n": n}).encode()


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    pytest.fail(f"not within ten seconds: {what}")


class World:
    """A log in memory behind a forwarding one; `start` again is a restart of the server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "waiting"
        self.behind = MemoryLog(partitions=3)
        self.aside: list[tuple[LogRecord, str]] = []
        self.waited: list[float] = []
        self.most = 1 << 20
        self.log: ForwardingLog
        self.start()

    def connect(self) -> EventLog:
        self.behind.health()
        return self.behind

    def start(self) -> None:
        self.log = ForwardingLog(
            self.connect,
            Spool(self.folder, default_log, self.most),
            lambda records, why: self.aside.extend((record, why) for record in records),
            observe=self.waited.append,
        )

    def numbers(self) -> dict[str, list[int]]:
        """key -> numbers in the order of the log; copies, which readers know by their id, are left out."""
        found: dict[str, list[int]] = defaultdict(list)
        for record in self.behind.records:
            n = json.loads(record.value)["n"]
            if n not in found[record.key]:
                found[record.key].append(n)
        return dict(found)

    def back(self) -> None:
        self.behind.down(False)
        until(lambda: not self.log.waits, "the log is written directly again")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.log.close()


def test_while_the_log_answers_positions_are_its_own(world: World) -> None:
    (place,) = world.log.append([event("a", 1)])
    assert [(r.partition, r.offset) for r in world.behind.records] == [place]
    assert world.log.append([]) == []
    assert not world.folder.exists()


def test_events_of_an_outage_follow_in_order_and_later_ones_queue_behind(world: World) -> None:
    world.log.append([event("a", 0), event("b", 0)])
    world.behind.down()
    for n in range(1, 40):
        assert world.log.append([event("a", n), event("b", n)]) == [WAITING, WAITING]
    assert world.log.waiting == 78
    with pytest.raises(LogUnavailable):
        world.log.health()
    world.back()
    assert world.log.append([event("a", 40)]) != [WAITING]
    assert world.numbers() == {"a": list(range(41)), "b": list(range(40))}
    assert world.log.waiting == 0
    assert not world.folder.exists(), "the spool goes when all of it was forwarded"
    assert world.waited
    world.log.health()


def test_order_is_kept_while_many_write_and_the_log_comes_and_goes(world: World) -> None:
    stop = threading.Event()
    sent: dict[str, int] = {}

    def write(key: str) -> None:
        n = 0
        while not stop.is_set():
            world.log.append([event(key, n), event(key, n + 1)])
            n += 2
        sent[key] = n

    threads = [threading.Thread(target=write, args=(key,)) for key in "abc"]
    for thread in threads:
        thread.start()
    for _ in range(6):
        world.behind.down()
        time.sleep(0.05)
        world.back()
    stop.set()
    for thread in threads:
        thread.join()
    until(lambda: not world.log.waits, "all is forwarded")
    assert world.numbers() == {key: list(range(n)) for key, n in sent.items()}


def test_a_log_that_is_away_at_the_start_is_opened_later(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.log.close()
    world.behind.down()
    world.start()
    assert world.log.waits
    with pytest.raises(LogUnavailable):
        world.log.ends()
    assert world.log.append([event("a", 1)]) == [WAITING]
    world.back()
    assert world.numbers() == {"a": [1]}
    world.log.close()


def test_what_waits_is_forwarded_after_a_restart(world: World) -> None:
    world.behind.down()
    world.log.append([event("a", n) for n in range(5)])
    world.log.close()
    world.start()
    assert world.log.waiting == 5
    world.log.append([event("a", 5)])
    world.back()
    assert world.numbers() == {"a": [0, 1, 2, 3, 4, 5]}


def test_a_position_that_cannot_be_read_sends_all_again(world: World) -> None:
    world.behind.down()
    world.log.append([event("a", n) for n in range(3)])
    world.log.close()
    (world.folder / "position.json").write_bytes(b'{"0":')
    world.start()
    world.back()
    assert world.numbers() == {"a": [0, 1, 2]}


def test_a_full_spool_refuses_and_takes_again_when_it_is_empty(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.log.close()
    world.most = 1000
    world.start()
    world.behind.down()
    taken = 0
    while world.log.spool.bytes + len(event("a", 10)[1]) + 65 <= 1000:
        world.log.append([event("a", taken)])
        taken += 1
    assert 5 < taken < 20
    with pytest.raises(LogUnavailable, match="no more are taken until it is back"):
        world.log.append([event("a", taken)])
    world.back()
    world.log.append([event("a", taken)])
    assert world.numbers() == {"a": list(range(taken + 1))}
    world.log.close()


def test_an_event_that_the_log_will_never_take_is_put_aside_and_the_others_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.behind.down()
    world.log.append([event("a", n) for n in range(4)])
    real = world.behind.append

    def particular(events: Any, headers: Any = None) -> Any:
        if any(b'"n": 2' in value for _, value in events) and not world.behind.world.is_down:
            raise EventError("too large")
        return real(events, headers)

    monkeypatch.setattr(world.behind, "append", particular)
    world.back()
    assert world.numbers() == {"a": [0, 1, 3]}
    assert [(record.value, why) for record, why in world.aside] == [(event("a", 2)[1], "too large")]


def test_an_erased_key_is_not_forwarded(world: World) -> None:
    world.behind.down()
    world.log.append([event("a", 1), event("b", 1), event("a", 2)])
    with pytest.raises(LogUnavailable):
        world.log.erase("a")
    world.back()
    assert world.numbers() == {"b": [1]}


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_forward import default_log, event
from memory_log import MemoryLog
from engine.streaming.events.forward import ForwardingLog
from engine.streaming.events.spool import Spool
behind = MemoryLog()
behind.down()
log = ForwardingLog(lambda: behind, Spool(Path({folder!r}), default_log, 1 << 30), print)
for n in range(1_000_000):
    log.append([event("a", n)])
    print(n, flush=True)
"""


def test_what_was_answered_survives_kill_9(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    answered = 50 + len(child.stdout.read().splitlines()) - 1  # the last line may be torn
    child.wait()
    world.log.close()
    world.folder = folder
    world.start()
    until(lambda: not world.log.waits, "all is forwarded")
    numbers = world.numbers()["a"]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= answered
