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
from engine.errors import EventError, LogUnavailable
from engine.files import sync
from plugins.events.segment import BEGINNING, FORMAT, SUFFIX, Segment, encode
from plugins.events.tombstones import Tombstones

_TEMPORARY = ".compact"
_NEW = ".new"


Entry = tuple[bytes, bytes, tuple[tuple[str, bytes], ...]]  # key, value, headers


@dataclass(frozen=True)
class Retention:
    """When a segment is full, and when a full one may go; None: never."""

    segment_bytes: int
    keep_bytes: int | None = None
    keep_seconds: float | None = None


class Partition:
    """Appends, reads, erases and compacts; one writer process, many threads."""

    def __init__(self, folder: Path, number: int, retention: Retention) -> None:
        self.folder, self.number, self.retention = folder, number, retention
        self.writes = False
        self.torn = 0  # bytes cut off at start
        self._lock = threading.RLock()
        self._sync_lock = threading.Lock()
        self._compacting = threading.Lock()
        self._written = self._synced = 0
        self.failed: OSError | None = None
        self._out: BinaryIO | None = None
        self.tombstones = Tombstones(folder)
        self._segments: list[Segment] = []

    def own(self) -> None:
        """From now on this process writes: cuts a torn tail off the last segment, or begins the first."""
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in [*self.folder.glob(f"*{_TEMPORARY}"), *self.folder.glob(f"*{SUFFIX}{_NEW}")]:
                left.unlink()
            self.tombstones.refresh()
            self._segments = self._list()
            if self._segments:
                self._segments[-1].scan()
            self._resume()
            self.writes = True

    def _list(self) -> list[Segment]:
        """The segments in the folder, those that are known and still the same file among them."""
        known = {(segment.path.name, segment.inode): segment for segment in self._segments}
        segments = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                found = known.get((path.name, path.stat().st_ino))
                segments.append(Segment(path, self.number) if found is None else found)
            except FileNotFoundError:  # retired by the process that writes, just now
                continue
        for segment, following in pairwise(segments):
            segment.size, segment.next_offset = segment.file_bytes, following.base
        return segments

    def _resume(self) -> None:
        """Makes the last segment fit to be added to; one of an older format is followed by the next."""
        if not self._segments:
            self._begin(0)
            return
        last = self._segments[-1]
        self.torn = last.file_bytes - last.size
        if last.size <= last.begins and last.format != FORMAT:
            self._segments.pop()
            self._begin(last.base)
            return
        if self.torn:
            os.truncate(last.path, last.size)
        if last.format != FORMAT:
            self._begin(last.next_offset)
            return
        self._out = last.path.open("ab", buffering=0)
        if self.torn:
            os.fsync(self._out.fileno())

    def _begin(self, offset: int) -> None:
        path = self.folder / f"{offset:020d}{SUFFIX}"
        temporary = path.with_name(path.name + _NEW)  # so that no reader sees a file without its beginning
        out = temporary.open("ab", buffering=0)
        out.write(BEGINNING)
        os.fsync(out.fileno())
        temporary.replace(path)
        sync(self.folder)
        self._out, before = out, self._out
        if before is not None:
            before.close()
        self._segments.append(Segment(path, self.number))

    # ---------------------------------------------------------------------------------------------- writing
    def append(self, records: Sequence[Entry]) -> tuple[list[int], int]:
        """(key, value, headers) each -> their offsets, and a mark for `sync`.

        LogUnavailable where the disk is full: whole records of the first ones may stay then, as a reader in another
        process may have seen them.
        """
        with self._lock:
            if self.failed is not None:
                raise EventError(f"{self.folder}: the log is closed to writing since an fsync failed: {self.failed}")
            if self._out is None:
                raise EventError(f"{self.folder}: the event log is closed")
            if self._segments[-1].size >= self.retention.segment_bytes:
                try:
                    self._roll()
                except OSError as error:
                    raise LogUnavailable(f"{self.folder}: the event log cannot be written: {error.strerror}") from error
            now = time.time()
            segment = self._segments[-1]
            first, start = segment.next_offset, segment.size
            chunks = [encode(first + n, key, value, now, headers) for n, (key, value, headers) in enumerate(records)]
            try:
                _write_all(self._out, b"".join(chunks))
            except OSError as error:
                self._note(segment, chunks, segment.file_bytes)
                os.ftruncate(self._out.fileno(), segment.size)
                raise LogUnavailable(f"{self.folder}: the event log cannot be written: {error.strerror}") from error
            self._note(segment, chunks, start + sum(map(len, chunks)))
            return list(range(first, first + len(chunks))), self._written

    def _note(self, segment: Segment, chunks: Sequence[bytes], until: int) -> None:
        """Takes the chunks that end by byte `until` as written."""
        for chunk in chunks:
            at = segment.size
            if at + len(chunk) > until:
                return
            segment.grew(segment.next_offset, at, at + len(chunk))
            self._written += len(chunk)

    def sync(self, mark: int | None = None) -> None:
        """Returns when everything up to `mark` is on the disk; callers that wait together share one fsync."""
        with self._sync_lock:
            with self._lock:
                out, target = self._out, self._written
                if out is None or self._synced >= (target if mark is None else mark):
                    return
                held = os.dup(out.fileno())  # another thread may end the segment meanwhile
            try:
                os.fsync(held)
            except OSError as error:
                self.failed = error  # what of it reached the disk is unknown from here on
                raise EventError(f"{self.folder}: fsync failed: {error.strerror}") from error
            finally:
                os.close(held)
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
    def begin(self) -> int:
        """The offset of the oldest record that is kept."""
        segments = self.segments()
        return segments[0].base if segments else 0

    @property
    def end(self) -> int:
        """The offset that the next record gets."""
        segments = self.segments()
        if segments and not self.writes:
            with self._lock:
                segments[-1].scan()
        return segments[-1].next_offset if segments else 0

    def segments(self) -> list[Segment]:
        """Those of now, oldest first; the last may grow. What another process has written since is looked up."""
        with self._lock:
            if not self.writes:
                self.tombstones.refresh()  # before the files: a tombstone goes only when its records are out of them
                self._segments = self._list()
            return list(self._segments)

    def read(self, start: int) -> Iterator[LogRecord]:
        """Records from offset `start` that are not erased, to the end at the time of the call."""
        found = self.segments()
        segments = [(s, s.size if self.writes or s is not found[-1] else None) for s in found]
        for segment, until in segments:
            if segment.next_offset > start or until is None:
                for record in segment.records(start, until):
                    if not self.tombstones.hides(record.key, record.offset):
                        yield record

    def at(self, seconds: float) -> int:
        """The first offset taken at or after a time, else the end; the clock is taken to go forward between files."""
        segments = self.segments()
        before = 0  # the file in which that offset may be
        for number, segment in enumerate(segments):
            record = next(segment.records(segment.base), None)
            if record is not None and record.seconds is not None and record.seconds >= seconds:
                break
            before = number
        for segment in segments[before:]:
            for record in segment.records(segment.base):
                if record.seconds is not None and record.seconds >= seconds:
                    return record.offset
        return self.end

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
                if self._segments[-1].base < highest and self._segments[-1].next_offset > self._segments[-1].base:
                    self._roll()
                sealed = [segment for segment in self._segments[:-1] if segment.base < highest]
            freed = sum(self._rewrite(segment) for segment in sealed)
            self.tombstones.drop(marks)
            return freed

    def _rewrite(self, segment: Segment) -> int:
        kept = bytearray(BEGINNING)
        dropped = False
        for record in segment.records(segment.base, segment.size):
            if self.tombstones.hides(record.key, record.offset):
                dropped = True
            else:
                kept += encode(record.offset, record.key.encode(), record.value, record.seconds, record.headers)
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
            if self.failed is None:
                self.sync()
            with self._lock:
                self._out.close()
                self._out = None


def _write_all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
