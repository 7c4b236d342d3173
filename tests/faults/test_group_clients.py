"""What readers of a group make of partitions that come, go and are paused, and of a broker that does not answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from engine.errors import LogUnavailable
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from tests.brokers import Broker
from tests.faults.test_broker_groups import spread, wait_for

CLIENTS = [KafkaEventLog, KafkaFastEventLog]


@pytest.fixture
def opened(tansu: Broker) -> Iterator[Callable[[type[Any]], Any]]:
    """A log of two partitions on a topic of its own."""
    logs: list[Any] = []

    def make(cls: type[Any]) -> Any:
        given = {"topic": f"clients-{uuid.uuid4().hex[:12]}", "partitions": 2, "session_timeout_ms": 1500}
        logs.append(cls(cls.Options.model_validate({**given, **tansu.options})))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_what_is_resumed_while_the_group_shares_anew_is_read(
    cls: type[Any], opened: Callable[[type[Any]], Any]
) -> None:
    log = opened(cls)
    first = log.reader(None, group=log.options.topic)
    wait_for(lambda: not first.poll(10, 0.05) and len(first.positions) == 2)
    first.pause([0, 1])
    second = log.reader(None, group=log.options.topic)
    wait_for(lambda: not second.poll(1, 0.2) and not first.poll(1, 0.2) and len(first.positions) < 2)
    first.resume([0, 1])
    wait_for(lambda: not second.poll(1, 0.2) and not first.poll(1, 0.2) and len(first.positions) == 1)
    (mine,) = first.positions
    its = [offset for partition, offset in spread(log, 50) if partition == mine]
    got: list[int] = []
    wait_for(lambda: len(got.extend(r.offset for r in first.poll(100, 0.05)) or got) >= len(its))
    assert got == sorted(its)
    first.close()
    second.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_where_to_begin_is_asked_again_where_the_brokers_did_not_answer(
    cls: type[Any], opened: Callable[[type[Any]], Any]
) -> None:
    log = opened(cls)
    places = spread(log, 40)
    asked = 0

    def begin(partitions: Sequence[int]) -> Mapping[int, int]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise LogUnavailable("no answer")
        return dict.fromkeys(partitions, 5)

    consumer = log._client.consumer(log.options.topic, log.options.topic, 10)
    consumer.subscribe(begin)
    got: set[tuple[int, int]] = set()
    failed = 0

    def read() -> bool:
        nonlocal failed
        try:
            got.update((r.partition, r.offset) for r in consumer.poll(100, 0.05).records)
        except LogUnavailable:
            failed += 1
        return asked >= 3 and len(got) >= sum(offset >= 5 for _, offset in places)

    wait_for(read)
    assert failed == 2
    assert got == {(partition, offset) for partition, offset in places if offset >= 5}
    consumer.close()
