"""Event log `local`: a durable, segmented log in a folder, for one server and no broker."""

from __future__ import annotations

import logging
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, Self

import mmh3
from pydantic import Field

from engine.components import Capability, EventLog, LogReader, LogRecord, PluginOptions
from engine.errors import EventError, LogUnavailable
from engine.hookspecs import hookimpl
from plugins.events.folder import begin, describe, own
from plugins.events.local_reader import Growth, LocalReader
from plugins.events.partition import Partition, Retention

log = logging.getLogger("plexrank.events")

_NAME = "[a-z][a-z0-9-]{0,63}"


class LocalEventLog(EventLog):
    """Events in files on this machine: appended, checksummed, erasable, whole again after kill -9.

    A folder a partition (by hash of the key), in it segments of bounded size. Each record has its length, offset and
    CRC-32. At start a torn tail is cut off. One process writes (the folder is locked), others may read it as it grows
    (`read_only`).
    `erase` hides a key's records at once and durably; a compaction in the background then removes their bytes.
    """

    name = "local"
    capabilities = frozenset(
        {Capability.HEADERS, Capability.TIMESTAMPS, Capability.SEEK_TIME, Capability.ERASE, Capability.DURABLE}
    )

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
        read_only: bool | Literal["until-append"] = Field(
            False,
            description="true: reads beside another process that writes; until-append: so, and takes the folder for "
            "writing at the first append",
        )

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        o = self.options
        self._root = Path(o.path)
        self._stop = threading.Event()
        self._background: list[threading.Thread] = []
        self._compactor = ThreadPoolExecutor(1, thread_name_prefix="plexrank-compaction")
        self._growth = Growth()
        self._owning = threading.Lock()
        self._owner: IO[str] | None = None
        self._description = describe(self._root) if o.read_only is True else begin(self._root, o.partitions)
        retention = Retention(
            o.segment_bytes, o.retention_bytes, None if o.retention_hours is None else o.retention_hours * 3600
        )
        self._partitions = [
            Partition(self._root / f"{number:04d}", number, retention) for number in range(self._description.partitions)
        ]
        if not o.read_only:
            self._own()

    def _own(self) -> None:
        """This process writes the log from now on."""
        with self._owning:
            if self._owner is not None:
                return
            owner = own(self._root)
            try:
                for partition in self._partitions:
                    partition.own()
                    if partition.torn:
                        log.warning("%s: cut off a torn tail of %d bytes", partition.folder, partition.torn)
                    if partition.tombstones.marks:
                        self._compact_later(partition)
            except BaseException:
                owner.close()
                raise
            self._owner = owner
            if self.options.fsync == "interval":
                thread = threading.Thread(target=self._sync_now_and_then, name="plexrank-fsync", daemon=True)
                thread.start()
                self._background.append(thread)

    def _to_write(self) -> None:
        if self.options.read_only is True:
            raise EventError(f"{self._root}: the event log is open for reading only")
        if self._owner is None:
            self._own()

    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> list[tuple[int, int]]:
        """In one write a partition; with `fsync: always` it is on the disk on return."""
        self._to_write()
        places: dict[int, list[int]] = defaultdict(list)
        for position, (key, _) in enumerate(events):
            places[self._partition_of(key)].append(position)
        answer: list[tuple[int, int]] = [(0, 0)] * len(events)
        for number, positions in places.items():
            partition = self._partitions[number]
            entries = [(events[p][0].encode(), events[p][1], headers[p] if headers else ()) for p in positions]
            offsets, mark = partition.append(entries)
            if self.options.fsync == "always":
                partition.sync(mark)
            for position, offset in zip(positions, offsets, strict=True):
                answer[position] = (number, offset)
        self._growth.note()
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

    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> LogReader:
        """Sees what another process writes within 5 ms."""
        if group is not None:
            raise EventError(f"{self._root}: a log in a folder does not share partitions out; leave the group out")
        return LocalReader(self._partitions, self.begins() if positions is None else positions, self._growth)

    def begins(self) -> dict[int, int]:
        """partition -> the offset of its oldest record."""
        return {partition.number: partition.begin for partition in self._partitions}

    def ends(self) -> dict[int, int]:
        """partition -> the offset that its next record gets."""
        return {partition.number: partition.end for partition in self._partitions}

    def position_at(self, seconds: float) -> dict[int, int]:
        """Reads the beginnings of the files, then the one in which the time lies."""
        return {partition.number: partition.at(seconds) for partition in self._partitions}

    def erase(self, key: str) -> int:
        """Reads the key's partition once to count; the bytes go in the background."""
        self._to_write()
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

    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> Self:
        """The folder `<path>-<name>`, which this process takes for writing at the first append.

        A compact one keeps everything.
        """
        if not re.fullmatch(_NAME, name):
            raise EventError(f"the name of a log's sibling must match {_NAME}, and {name!r} does not")
        changes: dict[str, Any] = {
            "path": str(self._root.with_name(f"{self._root.name}-{name}")),
            "partitions": partitions or len(self._partitions),
            "read_only": "until-append",
        }
        if compact:
            changes |= {"retention_bytes": None, "retention_hours": None}
        return type(self)(self.options.model_copy(update=changes))

    @property
    def identity(self) -> str:
        """Of the folder's description, so a log that was deleted and begun anew is another."""
        return f"local:{self._description.identity}"

    def health(self) -> None:
        """Whether the folder is still this log, and takes events."""
        if describe(self._root) != self._description:
            raise LogUnavailable(f"{self._root}: another log was begun in this folder; start again")
        for partition in self._partitions:
            if partition.failed is not None:
                raise LogUnavailable(f"{partition.folder}: an fsync failed: {partition.failed}; check the disk")

    def close(self) -> None:
        """Waits for a compaction, makes everything durable and gives the folder free."""
        self._stop.set()
        for thread in self._background:
            thread.join()
        self._compactor.shutdown(wait=True)
        for partition in self._partitions:
            partition.close()
        if self._owner is not None:
            self._owner.close()


@hookimpl
def event_logs() -> list[type[EventLog]]:
    return [LocalEventLog]
