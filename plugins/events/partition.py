"""One partition of the log: a folder of segments, of which the last is written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from engine.components import LogRecord
from engine.errors import EventError
from engine.files import sync
from plugins.events.segment import SUFFIX, Segment, encode
from plugins.events.tombstones import Tombstones

_TEMPORARY = ".compact"


@dataclass(frozen=True)
class Retention:
    """When a segment is full, and when a full one may go; None: never."""

    segment_bytes: int
    keep_bytes: int | None = None
    keep_seconds: float | None = None


class Partition:
    """Appends, reads, erases and compacts; one writer process, many threads."""

    def __init__(self, folder: Path, number: int, retention: Retention, *, writes: bool) -> None:
        self.folder, self.number, self.retention, self.writes = folder, number, retention, writes
        self.torn = 0  # bytes cut off at start
        self._lock = threading.RLock()
        self._sync_lock = threading.Lock()
        self._compacting = threading.Lock()
        self._written = self._synced = 0
        self._failed: OSError | None = None
        self._out: BinaryIO | None = None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{_TEMPORARY}"):
                left.unlink()
        self.tombstones = Tombstones(folder)
        self._segments = self._list()
        if writes:
            self._resume()

    def _list(self) -> list[Segment]:
        names = sorted(path for path in self.folder.glob(f"*{SUFFIX}"))
        segments = [Segment(path, self.number) for path in names]
        for segment, following in pairwise(segments):
            segment.size, segment.next_offset = segment.file_bytes, following.base
        if segments:
            segments[-1].scan()
        return segments

    def _resume(self) -> None:
        """Cuts a torn tail off the last segment, or begins the first."""
        if not self._segments:
            self._begin(0)
            return
        last = self._segments[-1]
        self.torn = last.file_bytes - last.size
        if self.torn:
            os.truncate(last.path, last.size)
        self._out = last.path.open("ab", buffering=0)
        if self.torn:
            os.fsync(self._out.fileno())

    def _begin(self, offset: int) -> None:
        path = self.folder / f"{offset:020d}{SUFFIX}"
        self._out = path.open("ab", buffering=0)
        sync(self.folder)
        self._segments.append(Segment(path, self.number))

    # ---------------------------------------------------------------------------------------------- writing
    def append(self, records: Sequence[tuple[bytes, bytes]]) -> tuple[list[int], int]:
        """(key, value) each -> their offsets, and a mark for `sync`. All of them are written or none."""
        with self._lock:
            if self._failed is not None:
                raise EventError(f"{self.folder}: the log is closed to writing since an fsync failed: {self._failed}")
            if self._out is None:
                raise EventError(f"{self.folder}: the event log is closed")
            if self._segments[-1].size >= self.retention.segment_bytes:
                try:
                    self._roll()
                except OSError as error:
                    raise EventError(f"{self.folder}: the event log cannot be written: {error.strerror}") from error
            segment = self._segments[-1]
            first, start = segment.next_offset, segment.size
            chunks = [encode(first + n, key, value) for n, (key, value) in enumerate(records)]
            try:
                _write_all(self._out, b"".join(chunks))
            except OSError as error:
                os.ftruncate(self._out.fileno(), start)
                raise EventError(f"{self.folder}: the event log cannot be written: {error.strerror}") from error
            at = start
            for offset, chunk in enumerate(chunks, start=first):
                segment.grew(offset, at, at + len(chunk))
                at += len(chunk)
            self._written += at - start
            return list(range(first, first + len(chunks))), self._written

    def sync(self, mark: int | None = None) -> None:
        """Returns when everything up to `mark` is on the disk; callers that wait together share one fsync."""
        with self._sync_lock:
            with self._lock:
                out, target = self._out, self._written
            if out is None or self._synced >= (target if mark is None else mark):
                return
            try:
                os.fsync(out.fileno())
            except OSError as error:
                self._failed = error  # what of it reached the disk is unknown from here on
                raise EventError(f"{self.folder}: fsync failed: {error.strerror}") from error
            self._synced = target

    def _roll(self) -> None:
        """Ends the written segment, begins the next and lets old ones go. The lock is held."""
        assert self._out is not None
        os.fsync(self._out.fileno())
        self._begin(self._segments[-1].next_offset)
        self._retire()

    def _retire(self) -> None:
        total = sum(segment.size for segment in self._segments)
        oldest = None if self.retention.keep_seconds is None else time.time() - self.retention.keep_seconds
        while len(self._segments) > 1:
            first = self._segments[0]
            too_large = self.retention.keep_bytes is not None and total > self.retention.keep_bytes
            if not too_large and (oldest is None or first.path.stat().st_mtime >= oldest):
                return
            first.path.unlink()
            total -= first.size
            del self._segments[0]

    # ---------------------------------------------------------------------------------------------- reading
    @property
    def end(self) -> int:
        """The offset that the next record gets."""
        with self._lock:
            if not self.writes:
                self._refresh()
            return self._segments[-1].next_offset if self._segments else 0

    def read(self, start: int) -> Iterator[LogRecord]:
        """Records from offset `start` that are not erased, to the end at the time of the call."""
        with self._lock:
            if not self.writes:
                self._refresh()
            segments = [(s, s.size if self.writes or s is not self._segments[-1] else None) for s in self._segments]
        for segment, until in segments:
            if segment.next_offset > start or until is None:
                for record in segment.records(start, until):
                    if not self.tombstones.hides(record.key, record.offset):
                        yield record

    def _refresh(self) -> None:
        """Another process writes: what is there now."""
        self._segments = self._list()
        self.tombstones = Tombstones(self.folder)

    # ---------------------------------------------------------------------------------------------- erasing
    def erase(self, key: str) -> int:
        """Hides a key's records from now on, durably -> how many there were; `compact` removes their bytes."""
        with self._lock:
            end = self._segments[-1].next_offset
        try:
            count = sum(record.key == key for record in self.read(0))
        except EventError:  # a damaged file must not keep anyone from being forgotten
            self.tombstones.add(key, end)
            raise
        if count:
            self.tombstones.add(key, end)
        return count

    def compact(self) -> int:
        """Rewrites the segments that hold erased records without them, then forgets the tombstones -> bytes freed."""
        with self._compacting:
            marks = dict(self.tombstones.marks)
            if not marks:
                return 0
            highest = max(marks.values())
            with self._lock:
                if self._segments[-1].base < highest and self._segments[-1].size:
                    self._roll()
                sealed = [segment for segment in self._segments[:-1] if segment.base < highest]
            freed = sum(self._rewrite(segment) for segment in sealed)
            self.tombstones.drop(marks)
            return freed

    def _rewrite(self, segment: Segment) -> int:
        kept = bytearray()
        dropped = False
        for record in segment.records(segment.base, segment.size):
            if self.tombstones.hides(record.key, record.offset):
                dropped = True
            else:
                kept += encode(record.offset, record.key.encode(), record.value)
        if not dropped:
            return 0
        temporary = segment.path.with_name(segment.path.name + _TEMPORARY)
        with temporary.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.utime(temporary, (segment.path.stat().st_atime, segment.path.stat().st_mtime))
        with self._lock:
            if segment not in self._segments:  # retired meanwhile
                temporary.unlink()
                return 0
            temporary.replace(segment.path)
            fresh = Segment(segment.path, self.number)
            fresh.size, fresh.next_offset = len(kept), segment.next_offset
            self._segments[self._segments.index(segment)] = fresh
        sync(self.folder)
        return segment.size - len(kept)

    def close(self) -> None:
        """Makes everything durable and ends writing."""
        if self._out is not None:
            if self._failed is None:
                self.sync()
            with self._lock:
                self._out.close()
                self._out = None


def _write_all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
