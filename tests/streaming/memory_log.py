"""An event log in memory, with switches for what goes wrong: no answer, records cut off, bytes changed."""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.components import EventLog, PluginOptions
from engine.components.logs import Capability, LogReader, LogRecord
from engine.errors import LogGap, LogUnavailable

_numbers = itertools.count(1)


@dataclass
class _Stream:
    partitions: list[list[LogRecord]]
    begins: list[int]
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass
class _World:
    """What all streams of one log share."""

    streams: dict[str, _Stream] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_down: bool = False


class MemoryLog(EventLog):
    """`MemoryLog(partitions=2)`; `sibling` shares its world, so `down()` takes all its streams down together."""

    name = "memory"
    capabilities = frozenset({Capability.HEADERS, Capability.TIMESTAMPS, Capability.SEEK_TIME, Capability.ERASE})

    def __init__(
        self,
        options: PluginOptions | None = None,
        *,
        partitions: int = 1,
        stream: str = "events",
        world: _World | None = None,
    ) -> None:
        super().__init__(options or PluginOptions())
        self.stream, self.world = stream, world or _World()
        with self.world.changed:
            self._held = self.world.streams.setdefault(
                stream, _Stream([[] for _ in range(partitions)], [0] * partitions)
            )

    # ---------------------------------------------------------------------------------------------- switches
    def down(self, is_down: bool = True) -> None:
        """While down every call raises LogUnavailable and nothing is written."""
        with self.world.changed:
            self.world.is_down = is_down
            self.world.changed.notify_all()

    def trim(self, partition: int, before: int) -> None:
        """The records before an offset are gone, as by retention: who stands there gets a LogGap."""
        with self.world.changed:
            self._held.begins[partition] = before
            self._held.partitions[partition] = [r for r in self._held.partitions[partition] if r.offset >= before]

    def drop(self, partition: int, offset: int) -> None:
        """One record is lost without a word."""
        with self.world.changed:
            self._held.partitions[partition] = [r for r in self._held.partitions[partition] if r.offset != offset]

    def overwrite(self, partition: int, offset: int, value: bytes) -> None:
        with self.world.changed:
            records = self._held.partitions[partition]
            for place, record in enumerate(records):
                if record.offset == offset:
                    records[place] = replace(record, value=value)

    @property
    def records(self) -> list[LogRecord]:
        with self.world.changed:
            return [r for partition in self._held.partitions for r in partition]

    # ---------------------------------------------------------------------------------------------- contract
    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> list[tuple[int, int]]:
        answer = []
        with self.world.changed:
            self._answers()
            for position, (key, value) in enumerate(events):
                number = zlib.crc32(key.encode()) % len(self._held.partitions)
                offset = self._end(number)
                carried = headers[position] if headers is not None else ()
                record = LogRecord(number, offset, key, bytes(value), time.time(), carried)
                self._held.partitions[number].append(record)
                answer.append((number, offset))
            self.world.changed.notify_all()
        return answer

    def _end(self, number: int) -> int:
        records = self._held.partitions[number]
        return records[-1].offset + 1 if records else self._held.begins[number]

    def _answers(self) -> None:
        if self.world.is_down:
            raise LogUnavailable(f"{self.stream}: the log is down; ask again later")

    def _from(self, number: int, start: int, limit: int) -> list[LogRecord]:
        return list(itertools.islice((r for r in self._held.partitions[number] if r.offset >= start), limit))

    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        found: list[LogRecord] = []
        with self.world.changed:
            self._answers()
            for number, start in positions.items():
                found += self._from(number, start, limit - len(found))
        return iter(found)

    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> MemoryReader:
        if group is not None:
            raise LogUnavailable("the log in memory has no groups")
        return MemoryReader(self, dict(self.begins() if positions is None else positions))

    def begins(self) -> dict[int, int]:
        with self.world.changed:
            self._answers()
            return dict(enumerate(self._held.begins))

    def ends(self) -> dict[int, int]:
        with self.world.changed:
            self._answers()
            return {number: self._end(number) for number in range(len(self._held.partitions))}

    def position_at(self, seconds: float) -> dict[int, int]:
        with self.world.changed:
            self._answers()
            return {
                number: next((r.offset for r in records if (r.seconds or 0.0) >= seconds), self._end(number))
                for number, records in enumerate(self._held.partitions)
            }

    def erase(self, key: str) -> int:
        with self.world.changed:
            self._answers()
            gone = sum(r.key == key and bool(r.value) for r in itertools.chain.from_iterable(self._held.partitions))
            for records in self._held.partitions:
                records[:] = [replace(r, value=b"") if r.key == key else r for r in records]
        return gone

    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> MemoryLog:
        return MemoryLog(partitions=partitions or len(self._held.partitions), stream=name, world=self.world)

    @property
    def identity(self) -> str:
        return f"memory:{self._held.number}:{self.stream}"

    def health(self) -> None:
        with self.world.changed:
            self._answers()

    def close(self) -> None:
        """Nothing is held: what was written stays for whoever has the world."""


class MemoryReader(LogReader):
    def __init__(self, log: MemoryLog, positions: dict[int, int]) -> None:
        self._log, self._positions = log, positions
        self._paused: set[int] = set()

    def poll(self, limit: int = 1000, timeout: float = 0.1) -> list[LogRecord]:
        world, until = self._log.world, time.monotonic() + timeout
        with world.changed:
            while True:
                self._log._answers()
                found = self._take(limit)
                left = until - time.monotonic()
                if found or left <= 0:
                    return found
                world.changed.wait(left)

    def _take(self, limit: int) -> list[LogRecord]:
        found: list[LogRecord] = []
        for number, position in self._positions.items():
            if number in self._paused:
                continue
            first, end = self._log._held.begins[number], self._log._end(number)
            if not first <= position <= end:
                raise LogGap(
                    f"{self._log.identity}: partition {number}: position {position} is not in [{first}, {end}]"
                )
            some = self._log._from(number, position, limit - len(found))
            if some:
                self._positions[number] = some[-1].offset + 1
                found += some
        return found

    @property
    def positions(self) -> dict[int, int]:
        return dict(self._positions)

    def seek(self, positions: Mapping[int, int]) -> None:
        self._positions.update(positions)

    def lag(self) -> dict[int, int]:
        with self._log.world.changed:
            return {n: max(0, self._log._end(n) - p) for n, p in self._positions.items()}

    def pause(self, partitions: Sequence[int]) -> None:
        self._paused.update(partitions)

    def resume(self, partitions: Sequence[int]) -> None:
        self._paused.difference_update(partitions)

    def close(self) -> None:
        self._positions = {}
