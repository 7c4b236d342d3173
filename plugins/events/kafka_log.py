"""An event log on a Kafka topic, over either client library. It never asks which broker it is that answers."""

from __future__ import annotations

import re
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

from engine.components import Capability, EventLog, LogReader, LogRecord, PluginOptions
from engine.errors import EventError, LogGap, LogUnavailable
from plugins.events.kafka_client import Client, Consumer, Fetched, KafkaOptions, OffsetGone, Topic
from plugins.events.kafka_reader import KafkaReader
from plugins.events.kafka_time import first_at

_NAME = "[a-z][a-z0-9-]{0,63}"
_PROBE_WAIT_MS = 10
_LOOK_AHEAD = 1000  # records in which `read` looks for tombstones at least


class KafkaLog(EventLog):
    """What both plugins share: topics, appending, looking up positions. Nothing connects before it is used."""

    capabilities = frozenset(
        {
            Capability.HEADERS,
            Capability.TIMESTAMPS,
            Capability.SEEK_TIME,
            Capability.GROUPS,
            Capability.DURABLE,
            Capability.COMPACTION,
        }
    )
    Options = KafkaOptions
    options: KafkaOptions

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        if self.options.api_version != "auto":
            version = tuple(int(part) for part in self.options.api_version.split("."))
            absent = set() if version >= (0, 11) else {Capability.HEADERS}
            if version < (0, 10, 1):  # such brokers are not told what a topic should be, either
                absent |= {Capability.TIMESTAMPS, Capability.SEEK_TIME, Capability.COMPACTION}
            self.capabilities = type(self).capabilities - absent
        self._client = self._make_client(self.options)
        self._lock = threading.RLock()
        self._probe: Consumer | None = None
        self._topic: Topic | None = None
        self._compact = False
        self._exactly = False  # whether another number of partitions is an error

    @classmethod
    @abstractmethod
    def _make_client(cls, options: KafkaOptions) -> Client: ...

    # ---------------------------------------------------------------------------------------------- the topic
    def topic(self) -> Topic:
        """As it was when this log first saw it; made where it is missing."""
        known = self._topic
        if known is not None:  # without the lock, which a slow question may hold
            return known
        with self._lock:
            if self._topic is None:
                name, wanted = self.options.topic, self.options.partitions
                found = self._client.topic(name) or self._made(name, wanted)
                if self._exactly and found.partitions != wanted:
                    raise EventError(
                        f"kafka topic {name} has {found.partitions} partitions and must have {wanted}: "
                        "delete it, or make it with that number"
                    )
                self._topic = found
            return self._topic

    def _made(self, name: str, partitions: int) -> Topic:
        if not self.options.create_topics:
            raise LogUnavailable(f"kafka topic {name} does not exist: make it, or set create_topics: true")
        self._client.create(name, partitions, compact=self._compact)
        until = time.monotonic() + self.options.timeout_ms / 1000
        while time.monotonic() < until:
            found = self._client.topic(name)
            if found is not None:
                return found
            time.sleep(0.05)
        raise LogUnavailable(f"kafka topic {name} was made and has no leader after {self.options.timeout_ms} ms")

    def current(self) -> Topic | None:
        """The topic as it is now; asks the brokers."""
        return self._client.topic(self.options.topic)

    @property
    def identity(self) -> str:
        """Topic and, where brokers have one, its id: a topic that was deleted and made anew is another."""
        return f"kafka:{self.options.topic}:{self.topic().identity}"

    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> Self:
        """The topic `<topic>.<name>`."""
        if not re.fullmatch(_NAME, name):
            raise EventError(f"the name of a log's sibling must match {_NAME}, and {name!r} does not")
        count = self.topic().partitions if partitions is None else partitions
        made = type(self)(
            self.options.model_copy(update={"topic": f"{self.options.topic}.{name}", "partitions": count})
        )
        made._compact, made._exactly = compact, partitions is not None
        return made

    def health(self) -> None:
        """Asks for the topic; one that is missing is well where the first use makes it."""
        if self.current() is None and (self._topic is not None or not self.options.create_topics):
            raise LogUnavailable(f"kafka topic {self.options.topic} is not on the brokers")

    # ---------------------------------------------------------------------------------------------- writing
    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> list[tuple[int, int]]:
        """Returns when all in-sync replicas have them; headers are dropped where brokers know none."""
        if not events:
            return []
        self.topic()
        try:
            return self._client.produce(self.options.topic, events, headers)
        except LogUnavailable:
            with self._lock:
                self._topic = None  # it may be gone; the next one makes it again
            raise

    def erase(self, key: str) -> int:
        """Appends a tombstone -> -1: brokers remove older records of the key only from compacted topics, in their time.

        `read` hides them where it meets the tombstone in what it reads.
        """
        self.topic()
        self._client.produce(self.options.topic, [(key, None)], None)
        return -1

    # ---------------------------------------------------------------------------------------------- reading
    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        """At most `limit` records in all, partition by partition."""
        ends, begins = self.ends(), self.begins()
        for partition, start in positions.items():
            if partition not in ends:
                raise EventError(f"kafka topic {self.options.topic}: there is no partition {partition}")
            at = max(start, begins[partition])
            while limit > 0 and at < ends[partition]:
                fetched, at = self._fetch(partition, at, max(limit, _LOOK_AHEAD))
                erased = {key: offset for _, offset, key in fetched.tombstones}
                for record in fetched.records:
                    if limit > 0 and erased.get(record.key, -1) < record.offset < ends[partition]:
                        yield record
                        limit -= 1

    def _fetch(self, partition: int, at: int, limit: int) -> tuple[Fetched, int]:
        """Some records from `at`, which lies before the end, and the offset after them."""
        until = time.monotonic() + self.options.timeout_ms / 1000
        with self._probing() as probe:
            probe.assign({partition: at})
            while time.monotonic() < until:
                fetched = probe.poll(limit, 0.1)
                after = probe.positions().get(partition, at)
                if after > at:
                    return fetched, after
        raise self._client.unavailable(f"reading topic {self.options.topic}", "no record came in time")

    @contextmanager
    def _probing(self) -> Iterator[Consumer]:
        """The consumer for questions and short reads; made anew after a failure."""
        with self._lock:
            self.topic()
            try:
                if self._probe is None:
                    self._probe = self._client.consumer(self.options.topic, None, _PROBE_WAIT_MS)
                yield self._probe
            except OffsetGone as error:
                raise LogGap(
                    f"kafka topic {self.options.topic}: {error}: retention took it, or the topic was begun anew"
                ) from error
            except LogUnavailable:
                if self._probe is not None:
                    self._probe.close()
                    self._probe = None
                raise

    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> LogReader:
        """Connects at its first poll."""
        return KafkaReader(self, self._client, positions, group)

    def note(self, group: str, positions: Mapping[int, int]) -> None:
        with self._of_group(group) as consumer:
            consumer.assign(positions)  # by hand: nobody joins the group
            consumer.commit(positions)

    def noted(self, group: str) -> dict[int, int]:
        with self._of_group(group) as consumer:
            return consumer.committed(range(self.topic().partitions))

    @contextmanager
    def _of_group(self, group: str) -> Iterator[Consumer]:
        self.topic()
        consumer = self._client.consumer(self.options.topic, group, _PROBE_WAIT_MS)
        try:
            yield consumer
        finally:
            consumer.close()

    def begins(self) -> dict[int, int]:
        """As the brokers say."""
        with self._probing() as probe:
            return probe.begins(range(self.topic().partitions))

    def ends(self) -> dict[int, int]:
        """The high watermarks in the answers to a fetch, as some brokers give too little as the newest offset."""
        until = time.monotonic() + self.options.timeout_ms / 1000
        with self._probing() as probe:
            said = probe.latest(range(self.topic().partitions))
            probe.assign(said)
            while time.monotonic() < until:
                probe.poll(1, 2 * _PROBE_WAIT_MS / 1000)
                known = probe.highwaters()
                if known.keys() == said.keys():
                    return {partition: max(known[partition], said[partition]) for partition in sorted(said)}
        raise self._client.unavailable(f"asking for the ends of topic {self.options.topic}", "no answer in time")

    def position_at(self, seconds: float) -> dict[int, int]:
        """Asks the brokers, looks whether the records there agree, and searches where they do not."""
        if Capability.SEEK_TIME not in self.capabilities:
            raise EventError(
                f"kafka with api_version {self.options.api_version} cannot find a time: begin at an offset"
            )
        begins, ends = self.begins(), self.ends()
        with self._probing() as probe:
            guesses = probe.at_time(list(ends), seconds)

        found = {}
        for partition, end in ends.items():

            def fetch(offset: int, partition: int = partition, end: int = end) -> LogRecord | None:
                while offset < end:
                    fetched, offset = self._fetch(partition, offset, 1)
                    if fetched.records:
                        return fetched.records[0]
                return None

            found[partition] = first_at(fetch, begins[partition], end, seconds, guesses.get(partition))
        return found

    def close(self) -> None:
        """Ends the connections; readers close their own."""
        with self._lock:
            if self._probe is not None:
                self._probe.close()
                self._probe = None
        self._client.close()
