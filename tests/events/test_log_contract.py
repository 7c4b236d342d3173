"""Every event log keeps one contract: in a folder, and in Kafka topics on each broker, through both clients."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from engine.testing import check_event_log
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from plugins.events.local import LocalEventLog
from tests.brokers import Broker, brokers

BACKENDS = [
    *[pytest.param(KafkaEventLog, name, id=f"kafka-{name}") for name in brokers()],
    *[pytest.param(KafkaFastEventLog, name, id=f"kafka-fast-{name}") for name in brokers() if name != "kafka09"],
]


@pytest.mark.parametrize("partitions", [1, 3])
def test_the_local_log_keeps_the_contract(partitions: int) -> None:
    assert check_event_log(LocalEventLog, {"partitions": partitions, "fsync": "never"}) == []


@pytest.mark.parametrize(("cls", "name"), BACKENDS)
def test_a_topic_keeps_the_contract(
    cls: type[Any], name: str, request: pytest.FixtureRequest, left_out: dict[str, list[str]]
) -> None:
    broker: Broker = request.getfixturevalue(name)
    options = {**broker.options, "topic": f"check-{uuid.uuid4().hex[:12]}", "partitions": 3}
    missing = check_event_log(cls, options)
    if missing:
        left_out[f"{cls.name} on {name}"] = missing
