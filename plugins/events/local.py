"""Event log `local`: a durable, segmented log in a folder, for one server and no broker."""

from __future__ import annotations

import fcntl
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import mmh3
from pydantic import Field

from engine.components import EventLog, LogRecord, PluginOptions
from engine.errors import EventError
from engine.hookspecs import hookimpl
from plugins.events.partition import Partition, Retention

log = logging.getLogger("plexrank.events")


class LocalEventLog(EventLog):
    """Events in files on this machine: appended, checksummed, erasable, whole again after kill -9.

    A folder a partition (by hash of the key), in it segments of bounded size. Each record has its length, offset and
    CRC-32. At start a torn tail is cut off. One process writes (the folder is locked), others may read (`read_only`).
    `erase` hides a key's records at once and durably; a compaction in the background then removes their bytes.
    """

    name = "local"

    class Options(PluginOptions):
        path: str = Field("events", description="the folder; relative to the server's state directory")
        partitions: int = Field(1, ge=1, le=1024, description="fixed when the folder is made")
        fsync: Literal["always", "interval", "never"] = Field(
            "always",
            description="always: an answered event survives a power cut; interval: all but the last ones; "
            "never: as the system pleases (each survives kill -9)",
        )
        interval_ms: int = Field(200, ge=1, description="fsync: interval: time between two")
        segment_bytes: int = Field(64 << 20, ge=4096, description="a file's size before the next begins")
        retention_bytes: int | None = Field(None, ge=4096, description="a partition's size; the oldest files go first")
        retention_hours: float | None = Field(None, gt=0, description="age after which a full file goes")
        read_only: bool = Field(False, description="reads beside another process that writes")

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        o = self.options
        self._root = Path(o.path)
        self._stop = threading.Event()
        self._background: list[threading.Thread] = []
        self._compactor = ThreadPoolExecutor(1, thread_name_prefix="plexrank-compaction")
        if not o.read_only:
            self._root.mkdir(parents=True, exist_ok=True)
            self._own()
        retention = Retention(
            o.segment_bytes, o.retention_bytes, None if o.retention_hours is None else o.retention_hours * 3600
        )
        self._partitions = [
            Partition(self._root / f"{number:04d}", number, retention, writes=not o.read_only)
            for number in range(self._count())
        ]
        for partition in self._partitions:
            if partition.torn:
                log.warning("%s: cut off a torn tail of %d bytes", partition.folder, partition.torn)
            if partition.tombstones.marks and not o.read_only:
                self._compact_later(partition)
        if o.fsync == "interval" and not o.read_only:
            thread = threading.Thread(target=self._sync_now_and_then, name="plexrank-fsync", daemon=True)
            thread.start()
            self._background.append(thread)

    def _own(self) -> None:
        self._owner = (self._root / "lock").open("w")
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._owner.close()
            raise EventError(
                f"{self._root}: another process writes this event log; stop it, or take another state directory"
            ) from error

    def _count(self) -> int:
        """The partitions that are there; a folder of another number is refused, as keys would change their place."""
        there = len(list(self._root.glob("[0-9][0-9][0-9][0-9]")))
        if there and not self.options.read_only and there != self.options.partitions:
            raise EventError(
                f"{self._root}: the log has {there} partitions and the configuration says {self.options.partitions}; "
                f"set partitions: {there}, or begin in an empty folder"
            )
        return there or self.options.partitions

    def append(self, events: Sequence[tuple[str, bytes]]) -> list[tuple[int, int]]:
        """In one write a partition; with `fsync: always` it is on the disk on return."""
        if self.options.read_only:
            raise EventError(f"{self._root}: the event log is open for reading only")
        places: dict[int, list[int]] = defaultdict(list)
        for position, (key, _) in enumerate(events):
            places[self._partition_of(key)].append(position)
        answer: list[tuple[int, int]] = [(0, 0)] * len(events)
        for number, positions in places.items():
            partition = self._partitions[number]
            offsets, mark = partition.append([(events[p][0].encode(), events[p][1]) for p in positions])
            if self.options.fsync == "always":
                partition.sync(mark)
            for position, offset in zip(positions, offsets, strict=True):
                answer[position] = (number, offset)
        return answer

    def _partition_of(self, key: str) -> int:
        return mmh3.hash(key.encode(), 0, signed=False) % len(self._partitions) if len(self._partitions) > 1 else 0

    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        """At most `limit` records in all; a damaged record raises EventError with file and byte."""
        for number, start in positions.items():
            if limit <= 0:
                return
            if not 0 <= number < len(self._partitions):
                raise EventError(f"{self._root}: there is no partition {number}; it has {len(self._partitions)}")
            for record in self._partitions[number].read(start):
                yield record
                limit -= 1
                if limit <= 0:
                    return

    def ends(self) -> dict[int, int]:
        """partition -> the offset that its next record gets."""
        return {partition.number: partition.end for partition in self._partitions}

    def erase(self, key: str) -> int:
        """Reads the key's partition once to count; the bytes go in the background."""
        if self.options.read_only:
            raise EventError(f"{self._root}: the event log is open for reading only")
        partition = self._partitions[self._partition_of(key)]
        count = partition.erase(key)
        if count:
            self._compact_later(partition)
        return count

    def compact(self) -> int:
        """Removes the bytes of erased records now -> bytes freed."""
        return sum(partition.compact() for partition in self._partitions)

    def _compact_later(self, partition: Partition) -> None:
        def run() -> None:
            try:
                partition.compact()
            except (OSError, EventError):
                log.exception("%s: the compaction failed; erased records stay hidden", partition.folder)

        self._compactor.submit(run)

    def _sync_now_and_then(self) -> None:
        while not self._stop.wait(self.options.interval_ms / 1000):
            for partition in self._partitions:
                try:
                    partition.sync()
                except EventError:
                    log.exception("%s: events may be lost in a power cut", partition.folder)

    def close(self) -> None:
        """Waits for a compaction, makes everything durable and gives the folder free."""
        self._stop.set()
        for thread in self._background:
            thread.join()
        self._compactor.shutdown(wait=True)
        for partition in self._partitions:
            partition.close()
        if not self.options.read_only:
            self._owner.close()


@hookimpl
def event_logs() -> list[type[EventLog]]:
    return [LocalEventLog]
