"""The copy of a learner's positions in the broker: for whoever watches lag, and for nobody to begin at."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from engine.components import PluginOptions
from engine.config import ComponentConfig
from engine.errors import LogUnavailable
from engine.plugins import installed
from engine.streaming.learning.monitoring import PositionsCopy, group_of
from engine.streaming.learning.topics import describe
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from plugins.events.local import LocalEventLog
from tests.brokers import Broker, brokers

CLIENTS = [pytest.param(KafkaEventLog, id="kafka"), pytest.param(KafkaFastEventLog, id="kafka-fast")]
PLACES = [
    (b, c) for b in brokers() for c in (KafkaEventLog, KafkaFastEventLog) if (b, c) != ("kafka09", KafkaFastEventLog)
]
"""librdkafka cannot consume from so old a broker (docs/brokers.md)."""


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    name, cls = request.param
    broker: Broker = request.getfixturevalue(name)
    topic = f"noted-{uuid.uuid4().hex[:12]}"
    broker.make_topic(topic, 2)
    log = cls(cls.Options.model_validate({**broker.options, "topic": topic, "partitions": 2}))
    yield log
    log.close()


@pytest.mark.parametrize("opened", PLACES, indirect=True, ids=lambda p: f"{p[0]}-{p[1].name}")
def test_positions_that_are_noted_are_found_and_no_reader_begins_there(opened: Any) -> None:
    log, group = opened, f"plexrank.{uuid.uuid4().hex[:8]}"
    log.append([(f"k{n}", b"v") for n in range(40)])
    assert log.noted(group) == {}
    log.note(group, {0: 3, 1: 5})
    log.note(group, {0: 7})
    assert log.noted(group) == {0: 7, 1: 5}
    assert log.noted(f"{group}.other") == {}
    reader = log.reader(log.begins())
    found: list[Any] = []
    while len(found) < 40:
        found += reader.poll(100, 1.0)
    reader.close()
    assert sorted(r.offset for r in found if r.partition == 0)[0] == 0


def test_a_log_in_a_folder_keeps_no_copy(tmp_path: Any) -> None:
    log = LocalEventLog(LocalEventLog.Options(path=str(tmp_path / "log")))
    log.note("g", {0: 0})
    assert log.noted("g") == {}
    copy = PositionsCopy(log, "films")
    copy.write({0: 0})
    copy.close()
    assert copy._thread is None
    log.close()


def test_topics_shows_the_lag_from_the_copy(tansu: Broker, tmp_path: Any) -> None:
    topic = f"noted-{uuid.uuid4().hex[:12]}"
    options = {**tansu.options, "topic": topic, "partitions": 2}
    log = KafkaEventLog(KafkaEventLog.Options.model_validate(options))
    log.append([(f"k{n}", b"v") for n in range(40)])
    ends = log.ends()
    copy = PositionsCopy(log, "films")
    copy.write({0: ends[0] - 4, 1: ends[1] - 1})
    copy.close()
    assert log.noted(group_of("films")) == {0: ends[0] - 4, 1: ends[1] - 1}
    use = ComponentConfig(name="kafka", options=options)
    rows = describe(installed(), use, tmp_path, model="films")
    assert [row.lag for row in rows if row.stream == "events"] == [4, 1]
    assert {row.lag for row in rows if row.stream != "events"} == {None}
    assert {row.lag for row in describe(installed(), use, tmp_path, model="other")} == {None}
    log.close()


class Slow(KafkaEventLog):
    """Notes when it is let, and fails once."""

    def __init__(self) -> None:
        super().__init__(KafkaEventLog.Options())
        self.let, self.entered = threading.Event(), threading.Event()
        self.calls: list[dict[int, int]] = []

    @classmethod
    def _make_client(cls, options: PluginOptions) -> Any:
        return None

    def note(self, group: str, positions: Any) -> None:
        self.calls.append(dict(positions))
        self.entered.set()
        assert self.let.wait(20)
        if len(self.calls) == 1:
            raise LogUnavailable("no broker")


def test_a_slow_or_absent_broker_holds_nobody_up_and_gets_the_newest() -> None:
    log = Slow()
    copy = PositionsCopy(log, "films")
    copy.write({0: 1})
    assert log.entered.wait(20)
    for offset in (2, 3, 4):
        copy.write({0: offset})
    log.let.set()
    copy.close()
    assert log.calls == [{0: 1}, {0: 4}]
