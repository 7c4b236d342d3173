"""Readers that share partitions by a group's name: none is lost when they come and go."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.components import EventLog, LogReader
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from tests.brokers import Broker

Logs = Any
PATIENCE = 30.0


@pytest.fixture
def open_log() -> Iterator[Any]:
    """Logs that are closed after the test; a member of a group that is silent for 3 s is out of it."""
    opened: list[EventLog] = []

    def make(broker: Broker, cls: type[Any], topic: str, partitions: int) -> EventLog:
        given = {"topic": topic, "partitions": partitions, "session_timeout_ms": 3000, **broker.options}
        opened.append(cls(cls.Options.model_validate(given)))
        return opened[-1]

    yield make
    for log in opened:
        log.close()


def spread(log: EventLog, events: int) -> set[tuple[int, int]]:
    return set(log.append([(f"user {n}", b"%d" % n) for n in range(events)]))


class Member:
    """Reads in a thread of its own and commits each batch, until it is told to leave."""

    def __init__(self, reader: LogReader) -> None:
        self.reader = reader
        self.read: list[tuple[int, int]] = []
        self.partitions: set[int] = set()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._leave.is_set():
            self.read += [(r.partition, r.offset) for r in self.reader.poll(20, 0.1)]
            self.partitions = set(self.reader.positions)
            self.reader.commit(self.reader.positions)
        self.reader.close()

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(PATIENCE)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not what() and time.monotonic() < until:
        time.sleep(0.05)
    assert what()


@pytest.mark.parametrize(
    ("cls", "name"), [(KafkaEventLog, "tansu"), (KafkaEventLog, "kafka09"), (KafkaFastEventLog, "tansu")]
)
def test_a_group_shares_partitions_out_anew_and_loses_nothing(
    cls: type[Any], name: str, request: pytest.FixtureRequest, open_log: Logs
) -> None:
    """One reader, then two, then the second alone."""
    broker: Broker = request.getfixturevalue(name)
    topic = f"group-{uuid.uuid4().hex[:12]}"
    broker.make_topic(topic, 4)
    log = open_log(broker, cls, topic, 4)
    places = spread(log, 200)
    members = [Member(log.reader(None, group=topic))]
    try:
        wait_for(lambda: len(set(members[0].read)) == 200)
        members.append(Member(log.reader(None, group=topic)))
        first, second = members
        wait_for(lambda: len(first.partitions) == len(second.partitions) == 2)
        assert first.partitions | second.partitions == {0, 1, 2, 3}
        places |= spread(log, 200)
        wait_for(lambda: len({*first.read, *second.read}) == 400)
        assert second.read
        first.leave()
        places |= spread(log, 100)
        wait_for(lambda: {*first.read, *second.read} == places)
    finally:
        for member in members:
            member.leave()
    assert len(places) == 500
    for member in members:
        assert len(set(member.read)) == len(member.read), "no reader gets a record twice"
    again = set(first.read) & set(second.read)
    assert len(again) <= 4 * 20, "what comes again to another is at most the batch that was not committed"


def test_what_was_read_and_not_committed_comes_again_to_whoever_gets_the_partition(
    tansu: Broker, open_log: Logs
) -> None:
    log = open_log(tansu, KafkaEventLog, f"hands-over-{uuid.uuid4().hex[:12]}", 1)
    places = log.append([("k", b"%d" % n) for n in range(30)])
    first = log.reader(None, group="hands-over")
    got: list[tuple[int, int]] = []
    wait_for(lambda: len(got.extend((r.partition, r.offset) for r in first.poll(100, 0.1)) or got) == 30)
    first.commit({0: 12})
    first.close()
    second = log.reader({0: 5}, group="hands-over")
    got.clear()
    wait_for(lambda: len(got.extend((r.partition, r.offset) for r in second.poll(100, 0.1)) or got) == 18)
    assert got == places[12:], "the later of its own position and the group's"
    second.close()
