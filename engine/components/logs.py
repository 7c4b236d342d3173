"""Where events are kept: durable, ordered within a partition, partitioned by key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from engine.components.base import Component, PluginOptions


class Capability(StrEnum):
    """What a backend may lack. A test that needs one is skipped by name where it is absent."""

    HEADERS = "headers"  # records carry headers
    TIMESTAMPS = "timestamps"  # records carry the log's own time
    SEEK_TIME = "seek_time"  # `position_at`
    GROUPS = "groups"  # readers may share partitions by a group's name
    ERASE = "erase"  # a key's records can be removed
    DURABLE = "durable"  # what was answered survives kill -9 of what keeps it
    COMPACTION = "compaction"  # a compacted log keeps a key's newest record only


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One stored event: its position in its partition, its key and its bytes (CloudEvents JSON, or an Arrow batch).

    seconds: when the log took it, by the log's clock; None where it keeps no time. headers: (name, bytes) each.
    """

    partition: int
    offset: int
    key: str
    value: bytes
    seconds: float | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


class LogReader(ABC):
    """Reads on from where it stands, for one thread. Made by `EventLog.reader`."""

    @abstractmethod
    def poll(self, limit: int = 1000, timeout: float = 0.1) -> list[LogRecord]:
        """At most `limit` records, in order within a partition; [] where none came in `timeout` seconds.

        LogGap where a position lies before the oldest record or beyond the newest (the log was cut or begun anew);
        LogUnavailable where the log does not answer: the reader may be polled again later.
        """

    @property
    @abstractmethod
    def positions(self) -> dict[int, int]:
        """partition -> the offset of the next record, of the partitions that this reader has now."""

    @abstractmethod
    def seek(self, positions: Mapping[int, int]) -> None:
        """Goes on from there."""

    @abstractmethod
    def lag(self) -> dict[int, int]:
        """partition -> records behind the newest, as far as is known without asking."""

    @abstractmethod
    def pause(self, partitions: Sequence[int]) -> None:
        """`poll` gives nothing of these until `resume`; a group's membership is kept alive meanwhile."""

    @abstractmethod
    def resume(self, partitions: Sequence[int]) -> None: ...

    def commit(self, positions: Mapping[int, int]) -> None:  # noqa: B027 - a log without groups has nothing to tell
        """Tells the group that what lies before these is done, so that whoever gets the partitions goes on there.

        To be called after what was done with the records is durable. Without a group nothing happens.
        """

    @abstractmethod
    def close(self) -> None: ...


class EventLog(Component, ABC):
    """A durable, ordered log of events, partitioned by key. Safe from many threads; readers are not shared.

    One log is one stream (a Kafka topic, a folder); `sibling` gives the streams beside it: `dead`, `examples`,
    `deltas`, `models`.
    """

    capabilities: frozenset[Capability] = frozenset()  # an instance may have fewer than its class

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> list[tuple[int, int]]:
        """(key, bytes) each -> (partition, offset) each; durable when it returns.

        headers: one tuple an event; dropped where the log keeps none. LogUnavailable where the log cannot be reached:
        then none, some or all may have been written, and the caller may send them again.
        """

    @abstractmethod
    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        """Records at and after `positions` (partition -> offset), in order in a partition, up to the ends of now."""

    @abstractmethod
    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> LogReader:
        """A reader of exactly these partitions from these offsets.

        None: all partitions from their oldest records. group (needs GROUPS): the partitions are shared out among the
        readers of that name; in one that it gets, a reader begins at the later of its own `positions` and what the
        group committed, else at the oldest record.
        """

    @abstractmethod
    def begins(self) -> dict[int, int]:
        """partition -> the offset of its oldest record (its end, if it is empty)."""

    @abstractmethod
    def ends(self) -> dict[int, int]:
        """partition -> the offset that its next record gets."""

    @abstractmethod
    def position_at(self, seconds: float) -> dict[int, int]:
        """partition -> the first offset that the log took at or after a time; its end where none (needs SEEK_TIME)."""

    @abstractmethod
    def erase(self, key: str) -> int:
        """Removes a key's records from what `read` gives, leaves a tombstone; how many there were (-1: not known)."""

    @abstractmethod
    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> Self:
        """The stream of another name beside this one; made where it is missing. To be closed by the caller.

        partitions: as many as this one's where None. compact: keeps at least each key's newest record.
        """

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names this very stream: positions of one identity mean nothing in another (a checkpoint compares it)."""

    def note(self, group: str, positions: Mapping[int, int]) -> None:
        """Writes positions down as a group's offsets, for whoever watches lag with the broker's own tools.

        Only a copy: no reader begins there, and the group has no members. Without GROUPS nothing happens.
        """

    def noted(self, group: str) -> dict[int, int]:
        """partition -> what was written down last; {} where nothing was, or nothing is kept (needs GROUPS)."""
        return {}

    @abstractmethod
    def health(self) -> None:
        """LogUnavailable where the log does not answer in the time that its options allow, or does not take events."""

    @abstractmethod
    def close(self) -> None: ...
