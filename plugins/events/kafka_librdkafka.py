"""The client library confluent-kafka, over librdkafka."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engine.components import LogRecord
from engine.errors import EventError, LogUnavailable, PluginError
from plugins.events.kafka_client import Client, Consumer, Event, Fetched, Headers, KafkaOptions, OffsetGone, Topic
from plugins.events.kafka_security import librdkafka_settings

try:
    import confluent_kafka as ck
    from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
except ImportError as missing:
    raise PluginError(
        "event log 'kafka-fast' needs confluent-kafka: pip install 'plexrank[kafka-fast]', or take 'kafka'"
    ) from missing

log = logging.getLogger("plexrank.events")
_quiet = logging.getLogger("plexrank.events.librdkafka")  # else the library writes to standard error
_quiet.setLevel(logging.CRITICAL)

_MOST = 100_000  # records in one call; the library takes no more than ten times this
_GONE = {ck.KafkaError.OFFSET_OUT_OF_RANGE, ck.KafkaError._AUTO_OFFSET_RESET}
_TOO_LARGE = {ck.KafkaError.MSG_SIZE_TOO_LARGE, ck.KafkaError.RECORD_LIST_TOO_LARGE}
_MISSING = {ck.KafkaError.UNKNOWN_TOPIC_OR_PART, ck.KafkaError._UNKNOWN_TOPIC, ck.KafkaError.LEADER_NOT_AVAILABLE}
_PASSING = {ck.KafkaError._TRANSPORT, ck.KafkaError._ALL_BROKERS_DOWN, ck.KafkaError._TIMED_OUT, *_MISSING}


class LibrdkafkaClient(Client):
    """One producer for all threads and one administrator."""

    def __init__(self, options: KafkaOptions) -> None:
        super().__init__(options)
        self._lock = threading.Lock()
        self._admin: AdminClient | None = None
        self._producer: ck.Producer | None = None
        self.said = ""  # the last complaint of the library's threads

    def _settings(self) -> dict[str, Any]:
        o = self.options
        settings: dict[str, Any] = {
            "bootstrap.servers": ",".join(o.bootstrap_servers),
            "client.id": "plexrank",
            "socket.timeout.ms": max(o.timeout_ms, 1000),
            "reconnect.backoff.max.ms": 1000,
            "error_cb": self._complained,
            "log_level": 2,
            **librdkafka_settings(o),
        }
        if o.api_version != "auto" and tuple(map(int, o.api_version.split("."))) < (0, 10):
            settings |= {"api.version.request": False, "broker.version.fallback": o.api_version}
        return settings

    def _complained(self, error: ck.KafkaError) -> None:
        self.said = error.str()

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """The library's exceptions as this project's."""
        try:
            yield
        except ck.KafkaException as error:
            cause = error.args[0]
            if cause.code() in _GONE:
                raise OffsetGone(cause.str()) from error
            raise self.unavailable(what, f"{cause.str()} {self.said}".strip()) from error

    def _administrator(self) -> AdminClient:
        with self._lock:
            if self._admin is None:
                self._admin = _made(AdminClient, self._settings())
            return self._admin

    def topic(self, name: str) -> Topic | None:
        seconds = self.options.timeout_ms / 1000
        with self.told(f"describing topic {name}"):
            # `list_topics` would make it, with as many partitions as the broker likes
            asked = self._administrator().describe_topics(ck.TopicCollection([name]), request_timeout=seconds)[name]
            try:
                found = asked.result(seconds + 1)
            except ck.KafkaException as error:
                if error.args[0].code() in _MISSING:
                    return None
                raise
        if not found.partitions:
            return None
        return Topic(len(found.partitions), _identity(found.topic_id))

    def create(self, name: str, partitions: int, *, compact: bool) -> None:
        config = {"cleanup.policy": "compact"} if compact else {}
        seconds = self.options.timeout_ms / 1000
        made = NewTopic(name, partitions, self.options.replication, config=config)
        with self.told(f"making topic {name}"):
            try:
                self._administrator().create_topics([made], request_timeout=seconds)[name].result(seconds + 1)
            except ck.KafkaException as error:
                if error.args[0].code() != ck.KafkaError.TOPIC_ALREADY_EXISTS:
                    raise

    def produce(self, topic: str, events: Sequence[Event], headers: Sequence[Headers] | None) -> list[tuple[int, int]]:
        producer = self._sender()
        places: list[tuple[int, int]] = [(-1, -1)] * len(events)
        failures: list[ck.KafkaError] = []
        waiting = len(events)

        def taken(number: int) -> Callable[[Any, Any], None]:
            def report(error: ck.KafkaError | None, message: Any) -> None:
                nonlocal waiting
                waiting -= 1
                if error is not None:
                    failures.append(error)
                else:
                    places[number] = (message.partition(), message.offset())

            return report

        try:
            for n, (key, value) in enumerate(events):
                producer.produce(
                    topic,
                    key=key.encode(),
                    value=value,
                    headers=list(headers[n]) if headers else None,
                    on_delivery=taken(n),
                )
            until = time.monotonic() + 2 * self.options.timeout_ms / 1000
            producer.flush(self.options.timeout_ms / 1000)
            while waiting and time.monotonic() < until:  # another thread may have got the report
                producer.poll(0.005)
        except BufferError as error:
            raise self.unavailable(f"writing to topic {topic}", "the queue is full") from error
        except ck.KafkaException as error:
            raise self._refused(topic, producer, error.args[0]) from error
        if failures:
            raise self._refused(topic, producer, failures[0])
        if waiting:
            self._discard(producer)
            raise self.unavailable(f"writing to topic {topic}", f"no answer in time {self.said}".strip())
        return places

    def _refused(self, topic: str, producer: ck.Producer, error: ck.KafkaError) -> EventError:
        if error.code() in _TOO_LARGE:
            return EventError(f"topic {topic}: an event is larger than the brokers take: {error.str()}")
        self._discard(producer)
        return self.unavailable(f"writing to topic {topic}", f"{error.str()} {self.said}".strip())

    def _discard(self, producer: ck.Producer) -> None:
        """What it still holds must not be written after events that are sent again by another."""
        with self._lock:
            if self._producer is producer:
                self._producer = None
        producer.purge()

    def _sender(self) -> ck.Producer:
        with self._lock:
            if self._producer is None:
                o = self.options
                self._producer = _made(
                    ck.Producer,
                    {
                        **self._settings(),
                        "acks": "all",
                        "enable.idempotence": o.api_version == "auto",
                        "linger.ms": o.linger_ms,
                        "batch.size": o.batch_bytes,
                        "compression.type": o.compression,
                        "partitioner": "murmur2_random",  # as every other client of Kafka puts keys
                        "message.timeout.ms": o.timeout_ms + o.linger_ms,
                        "allow.auto.create.topics": False,
                    },
                )
            return self._producer

    def consumer(self, topic: str, group: str | None, wait_ms: int) -> Consumer:
        o = self.options
        settings = {
            **self._settings(),
            "group.id": group or "plexrank-by-hand",  # the library wants one; nothing is committed under it
            "auto.offset.reset": "error",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,  # tells that a broker has answered, also where it has nothing
            "fetch.wait.max.ms": wait_ms,
            "max.partition.fetch.bytes": 4 << 20,
            "queued.max.messages.kbytes": 32 << 10,
            "session.timeout.ms": o.session_timeout_ms,
            "heartbeat.interval.ms": max(100, o.session_timeout_ms // 6),
            "allow.auto.create.topics": False,
        }
        return LibrdkafkaConsumer(self, _made(ck.Consumer, settings), topic)

    def close(self) -> None:
        with self._lock:
            producer = self._producer
            self._admin = self._producer = None
        if producer is not None:
            producer.flush(0)


def _identity(topic_id: Any) -> str:
    """As the other client writes it."""
    if topic_id is None:
        return ""
    high, low = topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits()
    number = (high % (1 << 64)) << 64 | low % (1 << 64)
    return str(uuid.UUID(int=number)) if number else ""


def _made(cls: Any, settings: dict[str, Any]) -> Any:
    try:
        return cls(settings, logger=_quiet)
    except ck.KafkaException as error:
        raise PluginError(f"event log 'kafka-fast': {error.args[0].str()}") from error


class LibrdkafkaConsumer(Consumer):
    """A librdkafka consumer of one topic."""

    def __init__(self, client: LibrdkafkaClient, consumer: ck.Consumer, topic: str) -> None:
        self._client, self._consumer, self._topic = client, consumer, topic
        self._seconds = client.options.timeout_ms / 1000
        self._at: dict[int, int] = {}
        self._answered: set[int] = set()  # since their place was set: before, the cached watermark is an older one
        self._paused: set[int] = set()
        self._given: list[int] | None = None  # by the group, and not begun yet
        self._begin: Callable[[Sequence[int]], Mapping[int, int]] | None = None

    def _of(self, partition: int, offset: int = ck.OFFSET_INVALID) -> ck.TopicPartition:
        return ck.TopicPartition(self._topic, partition, offset)

    def assign(self, positions: Mapping[int, int]) -> None:
        self._at = dict(positions)
        self._answered.clear()
        with self._client.told(f"reading topic {self._topic}"):
            self._consumer.assign([self._of(partition, offset) for partition, offset in positions.items()])

    def subscribe(self, begin: Callable[[Sequence[int]], Mapping[int, int]]) -> None:
        def assigned(consumer: ck.Consumer, places: list[ck.TopicPartition]) -> None:
            """An error here would be passed over and nothing be read: where to begin is asked behind it."""
            self._given = [place.partition for place in places]
            consumer.assign([self._of(partition, ck.OFFSET_BEGINNING) for partition in self._given])
            consumer.pause(places)

        def revoked(consumer: ck.Consumer, places: list[ck.TopicPartition]) -> None:
            self._given = None
            consumer.unassign()

        self._begin = begin
        self._consumer.subscribe([self._topic], on_assign=assigned, on_revoke=revoked, on_lost=revoked)

    def _begin_given(self) -> None:
        """LogUnavailable where the brokers do not say where to begin: the next poll asks again."""
        given, begin = self._given, self._begin
        if given is None or begin is None:
            return
        at = {partition: max(offset, self._at.get(partition, 0)) for partition, offset in begin(given).items()}
        self.assign(at)
        self._given = None
        for paused, change in ((True, self._consumer.pause), (False, self._consumer.resume)):  # it outlives `assign`
            change([self._of(partition) for partition in given if (partition in self._paused) is paused])

    def poll(self, limit: int, timeout: float) -> Fetched:
        self._begin_given()
        fetched = self._fetched(limit, timeout)
        try:
            self._begin_given()  # what the group shared out meanwhile
        except LogUnavailable:
            if not fetched.records and not fetched.tombstones:
                raise
        return fetched

    def _fetched(self, limit: int, timeout: float) -> Fetched:
        limit = min(limit, _MOST)
        with self._client.told(f"reading topic {self._topic}"):
            messages = self._consumer.consume(limit, timeout=0)
            if not messages and timeout > 0:  # `consume` would wait the whole time for `limit` of them
                first = self._consumer.poll(timeout)
                if first is not None:
                    messages = [first, *(self._consumer.consume(limit - 1, timeout=0) if limit > 1 else ())]
        records: list[LogRecord] = []
        tombstones: list[tuple[int, int, str]] = []
        message: Any
        for message in messages:
            error = message.error()
            if error is not None:
                if error.code() == ck.KafkaError._PARTITION_EOF:
                    self._answered.add(message.partition())
                else:
                    self._heard(error)
                continue
            partition, offset = message.partition(), message.offset()
            self._at[partition] = offset + 1
            self._answered.add(partition)
            key = (message.key() or b"").decode(errors="replace")
            value = message.value()
            if value is None:
                tombstones.append((partition, offset, key))
                continue
            kind, stamp = message.timestamp()
            seconds = None if kind == ck.TIMESTAMP_NOT_AVAILABLE else stamp / 1000
            headers = tuple((name, data or b"") for name, data in message.headers() or ())
            records.append(LogRecord(partition, offset, key, value, seconds, headers))
        return Fetched(records, tombstones)

    def _heard(self, error: ck.KafkaError) -> None:
        if error.code() in _GONE:
            raise OffsetGone(error.str())
        if error.code() in _PASSING or error.retriable():
            log.debug("kafka-fast: %s", error.str())  # it goes on by itself; `KafkaReader` looks whether brokers answer
            return
        raise self._client.unavailable(f"reading topic {self._topic}", error.str())

    def seek(self, positions: Mapping[int, int]) -> None:
        with self._client.told(f"reading topic {self._topic}"):
            for partition, offset in positions.items():
                self._consumer.seek(self._of(partition, offset))
                self._at[partition] = offset
                self._answered.discard(partition)

    def positions(self) -> dict[int, int]:
        if self._given is not None:
            return {}
        return {place.partition: self._at.get(place.partition, 0) for place in self._consumer.assignment()}

    def highwaters(self) -> dict[int, int]:
        found = {}
        for place in self._consumer.assignment():
            _, high = self._consumer.get_watermark_offsets(place, cached=True)
            if high >= 0 and place.partition in self._answered:
                found[place.partition] = high
        return found

    def begins(self, partitions: Sequence[int]) -> dict[int, int]:
        return {partition: low for partition, (low, _) in self._watermarks(partitions).items()}

    def latest(self, partitions: Sequence[int]) -> dict[int, int]:
        return {partition: high for partition, (_, high) in self._watermarks(partitions).items()}

    def _watermarks(self, partitions: Sequence[int]) -> dict[int, tuple[int, int]]:
        found = {}
        for partition in partitions:
            with self._client.told(f"asking for the ends of topic {self._topic}"):
                answer = self._consumer.get_watermark_offsets(self._of(partition), self._seconds, cached=False)
            if answer is None:
                raise self._client.unavailable(f"asking for the ends of topic {self._topic}", "no answer in time")
            found[partition] = answer
        return found

    def at_time(self, partitions: Sequence[int], seconds: float) -> dict[int, int | None]:
        with self._client.told(f"asking for a time in topic {self._topic}"):
            asked = [self._of(partition, int(seconds * 1000)) for partition in partitions]
            found = self._consumer.offsets_for_times(asked, self._seconds)
        return {place.partition: place.offset if place.offset >= 0 else None for place in found}

    def committed(self, partitions: Sequence[int]) -> dict[int, int]:
        with self._client.told(f"asking for the group's offsets of topic {self._topic}"):
            found = self._consumer.committed([self._of(partition) for partition in partitions], self._seconds)
        return {place.partition: place.offset for place in found if place.offset >= 0}

    def commit(self, positions: Mapping[int, int]) -> None:
        offsets = [self._of(partition, offset) for partition, offset in positions.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except ck.KafkaException as error:
            code = error.args[0].code()
            if code not in (ck.KafkaError.ILLEGAL_GENERATION, ck.KafkaError.REBALANCE_IN_PROGRESS):
                raise self._client.unavailable(
                    f"committing offsets of topic {self._topic}", error.args[0].str()
                ) from error

    def pause(self, partitions: Sequence[int]) -> None:
        self._paused.update(partitions)
        self._consumer.pause([self._of(place) for place in partitions if place in self.positions()])

    def resume(self, partitions: Sequence[int]) -> None:
        self._paused.difference_update(partitions)
        self._consumer.resume([self._of(place) for place in partitions if place in self.positions()])

    def close(self) -> None:
        self._consumer.close()
