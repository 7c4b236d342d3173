"""Reads on in a Kafka topic, and finds out itself when the log under it was cut or begun anew."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.components import LogReader, LogRecord
from engine.errors import EventError, LogGap, LogUnavailable
from plugins.events.kafka_client import Client, Consumer, OffsetGone

if TYPE_CHECKING:
    from plugins.events.kafka_log import KafkaLog

_LOOK_SECONDS, _LOOK_SECONDS_IDLE = 5.0, 2.0  # between two looks at whether the topic is still the same


class KafkaReader(LogReader):
    """Assigned by hand, or by a group. Some brokers answer an offset beyond the end with silence for ever, so positions
    are held against the high watermarks and the topic's identity is looked at now and then.
    """

    def __init__(self, log: KafkaLog, client: Client, positions: Mapping[int, int] | None, group: str | None) -> None:
        self._log, self._client, self._group = log, client, group
        self._topic = log.options.topic
        self._begin = None if positions is None else dict(positions)
        self._consumer: Consumer | None = None
        self._identity: str | None = None
        self._at: dict[int, int] = {}
        self._paused: set[int] = set()
        self._looked = 0.0

    def poll(self, limit: int = 1000, timeout: float = 0.1) -> list[LogRecord]:
        """Tombstones are passed over."""
        consumer = self._connected()
        try:
            fetched = consumer.poll(limit, timeout)
        except OffsetGone as error:
            raise self._gap(str(error)) from error
        for record in fetched.records:
            self._at[record.partition] = record.offset + 1
        for partition, offset, _ in fetched.tombstones:
            self._at[partition] = max(offset + 1, self._at.get(partition, 0))
        self._look(idle=not fetched.records)
        for partition, newest in consumer.highwaters().items():
            if self._at.get(partition, 0) > newest:
                raise self._gap(f"offset {self._at[partition]} of partition {partition} lies beyond the end, {newest}")
        return fetched.records

    def _connected(self) -> Consumer:
        if self._consumer is None:
            identity = self._log.topic().identity
            if self._identity not in (None, identity):
                raise self._gap("it was deleted and made anew")
            consumer = self._client.consumer(self._topic, self._group, self._log.options.fetch_wait_ms)
            try:
                if self._group is None:
                    self._assign(consumer)
                else:
                    consumer.subscribe(self._given)
            except BaseException:
                consumer.close()
                raise
            self._identity, self._consumer, self._looked = identity, consumer, time.monotonic()
        return self._consumer

    def _assign(self, consumer: Consumer) -> None:
        begins, ends = self._log.begins(), self._log.ends()
        self._at = dict(begins if self._begin is None else self._begin)
        for partition, offset in self._at.items():
            if partition not in ends:
                raise EventError(f"kafka topic {self._topic}: there is no partition {partition}; it has {len(ends)}")
            if offset < begins[partition]:
                raise self._gap(
                    f"offset {offset} of partition {partition} is no longer there, the oldest is {begins[partition]}"
                )
            if offset > ends[partition]:
                raise self._gap(f"offset {offset} of partition {partition} lies beyond the end, {ends[partition]}")
        consumer.assign(self._at)
        if self._paused:
            consumer.pause(sorted(self._paused))

    def _given(self, partitions: Sequence[int]) -> dict[int, int]:
        """The group has given these to this reader -> where it begins; those it had before go on where they were."""
        assert self._consumer is not None
        committed = self._consumer.committed(partitions)
        oldest = self._consumer.begins(partitions)
        begin = self._begin or {}
        before, self._at = self._at, {}
        for partition in partitions:
            known = [places[partition] for places in (before, begin, committed) if partition in places]
            self._at[partition] = max([oldest[partition], *known])
        return self._at

    def _look(self, *, idle: bool) -> None:
        now = time.monotonic()
        if now - self._looked < (_LOOK_SECONDS_IDLE if idle else _LOOK_SECONDS):
            return
        found = self._log.current()  # LogUnavailable where no broker answers
        self._looked = time.monotonic()
        if found is None:
            raise LogUnavailable(f"kafka topic {self._topic} is not on the brokers now")
        if found.identity != self._identity:
            raise self._gap("it was deleted and made anew")

    def _gap(self, what: str) -> LogGap:
        return LogGap(
            f"kafka topic {self._topic}: {what}: retention was quicker than the reader, or the topic was begun anew; "
            "begin at the oldest or the newest, or from a checkpoint of this topic"
        )

    @property
    def positions(self) -> dict[int, int]:
        """What was asked for, until the first poll."""
        if self._consumer is None:
            return dict(self._at or self._begin or {})
        return {partition: max(at, self._at.get(partition, 0)) for partition, at in self._consumer.positions().items()}

    def seek(self, positions: Mapping[int, int]) -> None:
        """Partitions that it did not have come in addition, where there is no group."""
        if self._group is not None and self._consumer is not None:
            mine = {partition: at for partition, at in positions.items() if partition in self._at}
            self._at |= mine
            self._consumer.seek(mine)
            return
        self._begin = {**self.positions, **positions}
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
            self._identity = None

    def lag(self) -> dict[int, int]:
        """From the last answers of the brokers; nothing of a partition that has had none."""
        if self._consumer is None:
            return {}
        at = self.positions
        return {p: max(0, newest - at[p]) for p, newest in self._consumer.highwaters().items() if p in at}

    def pause(self, partitions: Sequence[int]) -> None:
        self._paused.update(partitions)
        if self._consumer is not None:
            self._consumer.pause(partitions)

    def resume(self, partitions: Sequence[int]) -> None:
        self._paused.difference_update(partitions)
        if self._consumer is not None:
            self._consumer.resume(partitions)

    def commit(self, positions: Mapping[int, int]) -> None:
        """Positions of partitions that the reader does not have any more are left out."""
        if self._group is not None and self._consumer is not None:
            mine = {partition: at for partition, at in positions.items() if partition in self._at}
            if mine:
                self._consumer.commit(mine)

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
