"""The client library kafka-python, in pure Python."""

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
from plugins.events.kafka_client import (
    Client,
    Consumer,
    Event,
    Fetched,
    Headers,
    KafkaOptions,
    OffsetGone,
    Topic,
)
from plugins.events.kafka_security import python_settings

try:
    import kafka
    from kafka import errors
    from kafka.admin import KafkaAdminClient, NewTopic
    from kafka.consumer.subscription_state import ConsumerRebalanceListener
except ImportError as missing:
    raise PluginError("event log 'kafka' needs kafka-python: pip install 'plexrank[kafka]'") from missing


if logging.getLogger("kafka").level == logging.NOTSET:  # it logs each attempt; what matters is raised as LogUnavailable
    logging.getLogger("kafka").setLevel(logging.CRITICAL)

_NO_ID = str(uuid.UUID(int=0))
_CLOSE_SECONDS = 1.0


class PythonClient(Client):
    """One producer for all threads, one administrator; both are made anew after a failure."""

    def __init__(self, options: KafkaOptions) -> None:
        super().__init__(options)
        self._lock = threading.Lock()
        self._admin: KafkaAdminClient | None = None
        self._producer: kafka.KafkaProducer | None = None

    def _settings(self) -> dict[str, Any]:
        o = self.options
        version = None if o.api_version == "auto" else tuple(int(part) for part in o.api_version.split("."))
        return {
            "bootstrap_servers": o.bootstrap_servers,
            "client_id": "plexrank",
            "api_version": version,
            "bootstrap_timeout_ms": o.timeout_ms,
            "request_timeout_ms": o.timeout_ms,
            "reconnect_backoff_max_ms": 1000,
            **python_settings(o),
        }

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (errors.KafkaConfigurationError, AssertionError) as error:
            raise PluginError(f"event log 'kafka': {_words(error)}") from error
        except errors.KafkaError as error:
            raise self.unavailable(what, _words(error)) from error

    @contextmanager
    def _administrator(self, what: str) -> Iterator[KafkaAdminClient]:
        with self._lock:
            try:
                with self._told(what):
                    if self._admin is None:
                        self._admin = KafkaAdminClient(**self._settings())
                    yield self._admin
            except LogUnavailable:
                if self._admin is not None:
                    self._admin.close()
                    self._admin = None
                raise

    def topic(self, name: str) -> Topic | None:
        with self._administrator(f"describing topic {name}") as admin:
            (found,) = admin.describe_topics([name])
        if found["error_code"] or not found["partitions"]:
            return None
        identity = str(found.get("topic_id") or "")
        return Topic(len(found["partitions"]), "" if identity == _NO_ID else identity)

    def create(self, name: str, partitions: int, *, compact: bool) -> None:
        configs = {"cleanup.policy": "compact"} if compact else {}
        with self._administrator(f"making topic {name}") as admin:
            made = NewTopic(name, partitions, self.options.replication, topic_configs=configs)
            try:
                admin.create_topics([made], timeout_ms=self.options.timeout_ms)
            except (errors.TopicAlreadyExistsError, errors.UnrecognizedBrokerVersion, errors.IncompatibleBrokerVersion):
                return

    def produce(self, topic: str, events: Sequence[Event], headers: Sequence[Headers] | None) -> list[tuple[int, int]]:
        producer = self._sender()
        if producer.config["api_version"] < (0, 11):
            headers = None
        seconds = self.options.timeout_ms / 1000
        until = time.monotonic() + seconds
        try:
            futures = [
                producer.send(topic, key=key.encode(), value=value, headers=list(headers[n]) if headers else None)
                for n, (key, value) in enumerate(events)
            ]
            producer.flush(seconds)
            answers = [future.get(max(0.0, until - time.monotonic())) for future in futures]
        except errors.MessageSizeTooLargeError as error:
            raise EventError(f"topic {topic}: an event is larger than the brokers take: {_words(error)}") from error
        except (errors.RecordListTooLargeError, errors.UnsupportedCodecError) as error:
            raise EventError(f"topic {topic}: {_words(error)}") from error
        except errors.KafkaError as error:
            self._discard(producer)
            raise self.unavailable(f"writing to topic {topic}", _words(error)) from error
        return [(answer.partition, answer.offset) for answer in answers]

    def _sender(self) -> kafka.KafkaProducer:
        with self._lock:
            if self._producer is None:
                o = self.options
                settings = self._settings()
                version = settings["api_version"]
                with self._told("connecting a producer"):
                    self._producer = kafka.KafkaProducer(
                        **settings,
                        metrics_enabled=False,
                        acks="all",
                        linger_ms=o.linger_ms,
                        batch_size=o.batch_bytes,
                        compression_type=None if o.compression == "none" else o.compression,
                        max_block_ms=o.timeout_ms,
                        delivery_timeout_ms=o.timeout_ms + o.linger_ms + 1,
                        enable_idempotence=version is None or version >= (0, 11),
                        allow_auto_create_topics=False,
                    )
            return self._producer

    def _discard(self, producer: kafka.KafkaProducer) -> None:
        """What it still holds must not be written after events that are sent again by another."""
        with self._lock:
            if self._producer is producer:
                self._producer = None
        _close_producer(producer)

    def consumer(self, topic: str, group: str | None, wait_ms: int) -> Consumer:
        o = self.options
        settings: dict[str, Any] = {
            **self._settings(),
            "metrics_enabled": False,
            "group_id": group,
            "auto_offset_reset": "none",
            "enable_auto_commit": False,
            "fetch_max_wait_ms": wait_ms,
            "max_partition_fetch_bytes": 4 << 20,
            "session_timeout_ms": o.session_timeout_ms,
            "heartbeat_interval_ms": max(100, o.session_timeout_ms // 6),
            "allow_auto_create_topics": False,
        }
        with self._told(f"connecting a reader of topic {topic}"):
            return PythonConsumer(self, kafka.KafkaConsumer(**settings), topic, group is not None)

    def close(self) -> None:
        with self._lock:
            admin, producer = self._admin, self._producer
            self._admin = self._producer = None
        if admin is not None:
            admin.close()
        if producer is not None:
            _close_producer(producer)


def _close_producer(producer: kafka.KafkaProducer) -> None:
    """Drops what it holds. `close` alone waits for that, raises, and leaves the thread that would still write it.

    What keeps a name of the producer then waits once more when it is collected: hence `_closed`.
    """
    producer._sender.force_close()
    producer._sender.join(_CLOSE_SECONDS)
    try:
        producer.close(timeout=0)
    except errors.KafkaError:  # its thread still ends: it was told to, and its connection has timeouts
        producer._closed = True


def _words(error: Exception) -> str:
    """The last sentence, as some of the library's errors quote the whole request."""
    words = str(error) or type(error).__name__
    return words if len(words) <= 300 else f"{type(error).__name__}: {words[:300]}..."


class PythonConsumer(Consumer):
    """A KafkaConsumer of one topic."""

    def __init__(self, client: PythonClient, consumer: kafka.KafkaConsumer, topic: str, grouped: bool) -> None:
        self._client, self._consumer, self._topic, self._grouped = client, consumer, topic, grouped
        self._timeout = client.options.timeout_ms
        self._paused: set[int] = set()
        self._given: list[int] | None = None  # by the group, and not begun yet
        self._begin: Callable[[Sequence[int]], Mapping[int, int]] | None = None

    def _of(self, partition: int) -> kafka.TopicPartition:
        return kafka.TopicPartition(self._topic, partition)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (errors.OffsetOutOfRangeError, errors.NoOffsetForPartitionError, errors.LogTruncationError) as error:
            raise OffsetGone(_words(error)) from error
        except errors.KafkaError as error:
            raise self._client.unavailable(f"{what} topic {self._topic}", _words(error)) from error

    def assign(self, positions: Mapping[int, int]) -> None:
        self._consumer.assign([])
        self._consumer.assign([self._of(partition) for partition in positions])
        self.seek(positions)

    def subscribe(self, begin: Callable[[Sequence[int]], Mapping[int, int]]) -> None:
        self._begin = begin
        outer = self

        class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
            def on_partitions_revoked(self, revoked: Any) -> None:
                outer._given = None

            def on_partitions_assigned(self, assigned: Any) -> None:
                """Runs in the client's own thread, where nothing may be asked: the next poll finds where to begin."""
                outer._consumer.pause(*assigned)
                for place in assigned:
                    outer._consumer.seek(place, 0)
                outer._given = [place.partition for place in assigned]

        self._consumer.subscribe([self._topic], listener=Listener())

    def poll(self, limit: int, timeout: float) -> Fetched:
        with self._told("reading"):
            answer = self._consumer.poll(timeout_ms=int(timeout * 1000), max_records=limit)
        given = self._given
        if given is not None and self._begin is not None:
            self.seek(self._begin(given))  # raises where the brokers do not answer: the next poll asks again
            self._consumer.resume(*[self._of(partition) for partition in given if partition not in self._paused])
            if self._given is given:
                self._given = None
        records: list[LogRecord] = []
        tombstones: list[tuple[int, int, str]] = []
        for place, found in answer.items():
            partition = place.partition
            for r in found:
                key = "" if r.key is None else r.key.decode(errors="replace")
                if r.value is None:
                    tombstones.append((partition, r.offset, key))
                    continue
                seconds = None if r.timestamp is None or r.timestamp < 0 else r.timestamp / 1000
                headers = tuple((name, data or b"") for name, data in r.headers) if r.headers else ()
                records.append(LogRecord(partition, r.offset, key, r.value, seconds, headers))
        return Fetched(records, tombstones)

    def seek(self, positions: Mapping[int, int]) -> None:
        for partition, offset in positions.items():
            self._consumer.seek(self._of(partition), offset)

    def positions(self) -> dict[int, int]:
        found = {place.partition: self._consumer.position(place, timeout_ms=0) for place in self._mine()}
        return {partition: offset for partition, offset in found.items() if offset is not None}

    def _mine(self) -> list[kafka.TopicPartition]:
        return sorted(self._consumer.assignment())

    def highwaters(self) -> dict[int, int]:
        found = {place.partition: self._consumer.highwater(place) for place in self._mine()}
        return {partition: offset for partition, offset in found.items() if offset is not None}

    def begins(self, partitions: Sequence[int]) -> dict[int, int]:
        with self._told("asking for the oldest of"):
            found = self._consumer.beginning_offsets([self._of(p) for p in partitions], self._timeout)
        return {place.partition: offset for place, offset in found.items()}

    def latest(self, partitions: Sequence[int]) -> dict[int, int]:
        with self._told("asking for the newest of"):
            found = self._consumer.end_offsets([self._of(p) for p in partitions], self._timeout)
        return {place.partition: offset for place, offset in found.items()}

    def at_time(self, partitions: Sequence[int], seconds: float) -> dict[int, int | None]:
        with self._told("asking for a time in"):
            asked = {self._of(p): int(seconds * 1000) for p in partitions}
            found = self._consumer.offsets_for_times(asked, self._timeout)
        return {place.partition: None if answer is None else answer.offset for place, answer in found.items()}

    def committed(self, partitions: Sequence[int]) -> dict[int, int]:
        with self._told("asking for the group's offsets of"):
            found = {p: self._consumer.committed(self._of(p), timeout_ms=self._timeout) for p in partitions}
        return {partition: offset for partition, offset in found.items() if offset is not None and offset >= 0}

    def commit(self, positions: Mapping[int, int]) -> None:
        offsets = {self._of(p): kafka.OffsetAndMetadata(offset, "", -1) for p, offset in positions.items()}
        try:
            self._consumer.commit(offsets, timeout_ms=self._timeout)
        except (errors.CommitFailedError, errors.RebalanceInProgressError):
            return  # the partitions are another's by now, which reads them again
        except errors.KafkaError as error:
            raise self._client.unavailable(f"committing offsets of topic {self._topic}", _words(error)) from error

    def pause(self, partitions: Sequence[int]) -> None:
        self._paused.update(partitions)
        self._consumer.pause(*[place for place in self._mine() if place.partition in self._paused])

    def resume(self, partitions: Sequence[int]) -> None:
        self._paused.difference_update(partitions)
        self._consumer.resume(*[place for place in self._mine() if place.partition in set(partitions)])

    def close(self) -> None:
        self._consumer.close(autocommit=False, timeout_ms=self._timeout)
