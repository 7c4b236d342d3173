"""What the Kafka logs do beyond the contract: topics, true ends, times that brokers get wrong, old brokers."""

from __future__ import annotations

import time
import uuid
from typing import Any

import kafka
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from engine.components import Capability, LogRecord
from engine.errors import EventError, LogUnavailable
from plugins.events.kafka import KafkaEventLog
from plugins.events.kafka_fast import KafkaFastEventLog
from plugins.events.kafka_time import first_at
from tests.brokers import Broker

CLIENTS = [pytest.param(KafkaEventLog, id="kafka"), pytest.param(KafkaFastEventLog, id="kafka-fast")]


def name() -> str:
    return f"log-{uuid.uuid4().hex[:12]}"


def open_log(broker: Broker, cls: type[Any] = KafkaEventLog, **options: Any) -> Any:
    return cls(cls.Options.model_validate({**broker.options, "topic": name(), "partitions": 1, **options}))


@pytest.mark.parametrize("cls", CLIENTS)
def test_the_ends_are_right_where_the_broker_says_too_little(cls: type[Any], tansu: Broker) -> None:
    """Tansu's ListOffsets gives the last batch's first offset + 1."""
    log = open_log(tansu, cls, linger_ms=50)
    log.append([("k", b"%d" % n) for n in range(100)])
    consumer = kafka.KafkaConsumer(bootstrap_servers=tansu.bootstrap)
    said = consumer.end_offsets([kafka.TopicPartition(log.options.topic, 0)])
    consumer.close()
    assert set(said.values()) != {100}, "the broker no longer does; this test proves nothing now"
    assert log.ends() == {0: 100}
    assert log.begins() == {0: 0}
    log.close()


def test_both_clients_see_one_topic_with_one_identity_and_put_keys_in_the_same_partitions(tansu: Broker) -> None:
    slow = open_log(tansu, partitions=5)
    fast = open_log(tansu, KafkaFastEventLog, topic=slow.options.topic, partitions=5)
    assert slow.identity == fast.identity
    keys = ["", "a", "user 1", "用户", "x" * 300, *(f"k{n}" for n in range(40))]
    of = [[p for p, _ in log.append([(key, b"v") for key in keys])] for log in (slow, fast)]
    assert of[0] == of[1]
    assert len(set(of[0])) == 5
    slow.close()
    fast.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_compact_sibling_is_made_with_the_policy_that_keeps_each_keys_newest(cls: type[Any], tansu: Broker) -> None:
    log = open_log(tansu, cls, partitions=3)
    models = log.sibling("models", partitions=1, compact=True)
    assert models.ends() == {0: 0}
    admin = KafkaAdminClient(bootstrap_servers=tansu.bootstrap)
    topic = ConfigResource(ConfigResourceType.TOPIC, f"{log.options.topic}.models")
    described = admin.describe_configs([topic], config_filter="all")
    admin.close()
    assert "'compact'" in str(described)
    assert log.sibling("dead").ends() == {0: 0, 1: 0, 2: 0}
    with pytest.raises(EventError, match=r"models has 1 partitions and must have 2"):
        log.sibling("models", partitions=2).ends()
    with pytest.raises(EventError, match="must match"):
        log.sibling("Not a name")
    models.close()
    log.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_topic_that_exists_keeps_its_partitions_and_a_missing_one_is_made_only_if_allowed(
    cls: type[Any], tansu: Broker
) -> None:
    log = open_log(tansu, cls, partitions=2)
    assert log.ends() == {0: 0, 1: 0}
    again = open_log(tansu, cls, topic=log.options.topic, partitions=7, create_topics=False)
    assert again.ends() == {0: 0, 1: 0}
    absent = open_log(tansu, cls, create_topics=False)
    with pytest.raises(LogUnavailable, match="does not exist: make it, or set create_topics: true"):
        absent.append([("k", b"v")])
    for each in (log, again, absent):
        each.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_tombstones_hide_what_lies_before_them_and_are_passed_over(cls: type[Any], tansu: Broker) -> None:
    log = open_log(tansu, cls)
    log.append([("anna", b"1"), ("bert", b"2"), ("anna", b"3")])
    assert log.erase("anna") == -1
    log.append([("anna", b"4"), ("bert", b"")])
    assert [(r.key, r.value) for r in log.read({0: 0}, 100)] == [("bert", b"2"), ("anna", b"4"), ("bert", b"")]
    assert [r.offset for r in log.read({0: 0}, 2)] == [1, 4], "more is fetched where hidden records took the places"
    assert list(log.read({0: 6})) == []
    reader = log.reader({0: 3})
    found: list[LogRecord] = []
    until = time.monotonic() + 20
    while len(found) < 2 and time.monotonic() < until:
        found += reader.poll(10, 0.2)
    assert [r.offset for r in found] == [4, 5], "the tombstone itself is no event"
    assert reader.positions == {0: 6}
    reader.close()
    log.close()


@pytest.mark.parametrize("cls", CLIENTS)
def test_a_message_larger_than_the_broker_takes_is_refused_for_good(cls: type[Any], tansu: Broker) -> None:
    log = open_log(tansu, cls)
    with pytest.raises(EventError, match="larger than the brokers take") as error:
        log.append([("k", bytes(3 << 20))])
    assert not isinstance(error.value, LogUnavailable), "sending it again would not help"
    assert log.append([("k", b"next")]) == [(0, 0)]
    log.close()


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_compressed_batches_come_back(compression: str, tansu: Broker) -> None:
    log = open_log(tansu, compression=compression)
    log.append([("k", b"%d" % n * 100) for n in range(200)])
    assert [r.value for r in log.read({0: 0}, 1000)] == [b"%d" % n * 100 for n in range(200)]
    log.close()


def test_an_old_protocol_has_fewer_capabilities_and_says_so(kafka09: Broker) -> None:
    log = open_log(kafka09)
    assert type(log).capabilities - log.capabilities == {
        Capability.HEADERS,
        Capability.TIMESTAMPS,
        Capability.SEEK_TIME,
        Capability.COMPACTION,
    }
    with pytest.raises(EventError, match=r"api_version 0\.9 cannot find a time"):
        log.position_at(1.0)
    log.close()


@given(
    st.lists(st.floats(0, 1e6), max_size=50).map(sorted),
    st.floats(-1, 1e6 + 1),
    st.none() | st.integers(-3, 60),
    st.integers(0, 5),
)
def test_a_time_is_found_whatever_the_broker_says(
    times: list[float], seconds: float, guess: int | None, begin: int
) -> None:
    end = begin + len(times)

    def fetch(offset: int) -> LogRecord | None:
        return LogRecord(0, offset, "k", b"", times[offset - begin]) if offset < end else None

    expected = next((begin + n for n, time_ in enumerate(times) if time_ >= seconds), end)
    assert first_at(fetch, begin, end, seconds, guess) == expected


def test_records_without_a_time_cannot_be_searched_by_one() -> None:
    with pytest.raises(EventError, match="keep no time"):
        first_at(lambda offset: LogRecord(0, offset, "k", b""), 0, 5, 1.0, 2)
