"""Brokers that are down, die, hang, or forget everything; real ones, killed with -9."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import LogGap, LogUnavailable
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from tests.brokers import Broker

Logs = Any
DURABLE = ["tansu_s3", "kafka09"]
CLIENTS = [pytest.param(KafkaEventLog, id="kafka"), pytest.param(KafkaFastEventLog, id="kafka-fast")]
PATIENCE = 30.0


@pytest.fixture
def open_log() -> Iterator[Any]:
    """Logs on topics of their own, closed after the test."""
    opened: list[EventLog] = []

    def make(broker: Broker, cls: type[Any] = KafkaEventLog, **options: Any) -> EventLog:
        given = {"topic": f"faults-{uuid.uuid4().hex[:12]}", "partitions": 1, "timeout_ms": 1500, **broker.options}
        log = cls(cls.Options.model_validate({**given, **options}))
        opened.append(log)
        return log

    yield make
    for log in opened:
        log.close()


@pytest.fixture
def read_on() -> Iterator[Any]:
    """Readers, closed after the test."""
    opened: list[LogReader] = []

    def make(log: EventLog, positions: dict[int, int] | None = None, group: str | None = None) -> LogReader:
        opened.append(log.reader(positions, group))
        return opened[-1]

    yield make
    for reader in opened:
        reader.close()


def gather(reader: LogReader, count: int) -> list[LogRecord]:
    """What a reader gives until `count` records came; a broker that does not answer is asked again."""
    found: list[LogRecord] = []
    until = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        try:
            found += reader.poll(100, 0.2)
        except LogUnavailable:
            time.sleep(0.1)
    return found


def until_unavailable(reader: LogReader) -> list[LogRecord]:
    """What was fetched before the broker went."""
    found: list[LogRecord] = []
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            found += reader.poll(100, 0.2)
        except LogUnavailable:
            return found
    raise AssertionError("a reader says that no broker answers")


def append_at_last(log: EventLog, event: tuple[str, bytes]) -> tuple[int, int]:
    """Sends again until the broker answers, as whoever appends must."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            (place,) = log.append([event])
            return place
        except LogUnavailable:
            assert time.monotonic() < until, "the broker is back and the log does not find it"


@pytest.mark.parametrize("name", DURABLE)
def test_kill_9_of_the_broker_loses_nothing_that_was_answered_and_the_same_reader_goes_on(
    name: str, request: pytest.FixtureRequest, open_log: Logs, read_on: Logs
) -> None:
    broker: Broker = request.getfixturevalue(name)
    log = open_log(broker)
    answered = dict(zip(log.append([("k", b"%d" % n) for n in range(300)]), range(300), strict=True))
    reader = read_on(log)
    seen = gather(reader, 200)
    broker.kill()
    try:
        with pytest.raises(LogUnavailable, match="is the broker running"):
            log.append([("k", b"lost or not, it was not answered")])
        seen += until_unavailable(reader)
    finally:
        broker.start()
    answered[append_at_last(log, ("k", b"300"))] = 300
    last = max(offset for _, offset in answered)
    until = time.monotonic() + PATIENCE
    while reader.positions[0] <= last and time.monotonic() < until:
        seen += gather(reader, 1)
    assert [r.offset for r in seen] == list(range(last + 1)), "each offset once, in order"
    read = {(r.partition, r.offset): r.value for r in seen}
    assert {place: int(read[place]) for place in answered} == answered
    assert {(r.partition, r.offset): r.value for r in log.read({0: 0}, 1000)} == read


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_broker_that_is_down_at_the_start_is_an_error_that_says_so(
    cls: type[Any], own_tansu: Broker, open_log: Logs, read_on: Logs
) -> None:
    log = open_log(own_tansu, cls, timeout_ms=600)
    reader = read_on(log)
    for ask in (log.health, log.ends, lambda: log.append([("k", b"v")]), reader.poll, lambda: log.identity):
        with pytest.raises(LogUnavailable, match=rf"{own_tansu.bootstrap}.*is the broker running"):
            ask()
    own_tansu.start()
    assert append_at_last(log, ("k", b"now")) == (0, 0)
    assert [r.value for r in gather(reader, 1)] == [b"now"]
    log.health()


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_log_that_was_begun_anew_is_a_gap_and_never_silence(
    cls: type[Any], own_tansu: Broker, open_log: Logs, read_on: Logs
) -> None:
    own_tansu.start()
    log = open_log(own_tansu, cls)
    log.append([("k", b"%d" % n) for n in range(20)])
    reader, before = read_on(log), log.identity
    assert len(gather(reader, 20)) == 20
    own_tansu.kill()
    own_tansu.start()
    append_at_last(log, ("k", b"of another log"))
    with pytest.raises(LogGap, match="begun anew"):
        gather(reader, 1)
    assert log.identity != before
    with pytest.raises(LogGap, match="offset 20 of partition 0 lies beyond the end, 1"):
        read_on(log, {0: 20}).poll()


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_new_log_that_has_grown_past_the_position_is_told_from_the_old_one(
    cls: type[Any], own_tansu: Broker, open_log: Logs, read_on: Logs
) -> None:
    own_tansu.start()
    log = open_log(own_tansu, cls)
    log.append([("k", b"old")])
    reader = read_on(log)
    assert [r.value for r in gather(reader, 1)] == [b"old"]
    own_tansu.kill()
    own_tansu.start()
    append_at_last(log, ("k", b"new 0"))
    log.append([("k", b"new %d" % n) for n in range(1, 50)])
    with pytest.raises(LogGap, match="deleted and made anew"):
        gather(reader, 1000)


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_broker_that_hangs_is_given_up_in_time_and_taken_up_again(
    cls: type[Any], own_tansu: Broker, open_log: Logs, read_on: Logs
) -> None:
    own_tansu.start()
    log = open_log(own_tansu, cls)
    log.append([("k", b"before")])
    own_tansu.pause()
    try:
        with pytest.raises(LogUnavailable):
            log.append([("k", b"meanwhile")])
        with pytest.raises(LogUnavailable):
            log.health()
    finally:
        own_tansu.go_on()
    append_at_last(log, ("k", b"after"))
    values = [r.value for r in log.read({0: 0}, 100)]
    assert values[0] == b"before"
    assert values[-1] == b"after"


def test_what_a_hung_broker_did_not_take_is_dropped_with_the_thread_that_would_still_write_it(
    own_tansu: Broker, open_log: Logs
) -> None:
    """Else it could come after events that were sent again, and collecting the producer would hold up a thread."""
    own_tansu.start()
    log = open_log(own_tansu)
    log.append([("k", b"before")])
    producer = log._client._producer
    own_tansu.pause()
    try:
        with pytest.raises(LogUnavailable):
            log.append([("k", b"meanwhile")])
        assert producer._closed
        assert not producer._sender.is_alive()
    finally:
        own_tansu.go_on()


@pytest.mark.parametrize(
    ("cls", "name"), [(KafkaEventLog, "tansu"), (KafkaEventLog, "kafka09"), (KafkaFastEventLog, "tansu")]
)
def test_large_messages_and_keys_of_any_script_come_through(
    cls: type[Any], name: str, request: pytest.FixtureRequest, open_log: Logs, read_on: Logs
) -> None:
    log = open_log(request.getfixturevalue(name), cls, partitions=1)
    keys = ["", "naïve", "用户", "👩‍🔧", "a\x00b", "é" * 500]
    events = [(key, bytes([n]) * 900_000) for n, key in enumerate(keys)]
    places = [log.append([event])[0] for event in events]
    assert places == [(0, n) for n in range(len(keys))]
    reader = read_on(log, {0: 0})
    assert [(r.key, r.value) for r in gather(reader, len(keys))] == events
