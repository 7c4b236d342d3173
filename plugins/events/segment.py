"""One file of the log: records behind one another, each with its length and checksum.

A record is `length u32 | crc32 u32 | offset u64 | key length u32 | key | value`, little endian; length counts what
follows the checksum, and the checksum covers it. The file's name is the offset of its first record.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from engine.components import LogRecord
from engine.errors import EventError

_HEAD = struct.Struct("<II")
_BODY = struct.Struct("<QI")
SUFFIX = ".log"
MAX_RECORD = 16 << 20
_INDEX_EVERY = 64 << 10
_READ = 1 << 20


def encode(offset: int, key: bytes, value: bytes) -> bytes:
    """The bytes of one record. EventError if it is larger than 16 MiB."""
    body = _BODY.pack(offset, len(key)) + key + value
    if len(body) > MAX_RECORD:
        raise EventError(f"an event of {len(body)} bytes is larger than the log takes ({MAX_RECORD})")
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


class Segment:
    """A readable file of records. It keeps its descriptor, so a compaction may replace the file under a reader.

    `size`: bytes of whole records, `next_offset`: the offset after the last; kept by the writer, or found by `scan`.
    """

    def __init__(self, path: Path, partition: int) -> None:
        self.path = path
        self.partition = partition
        self.base = int(path.name.removesuffix(SUFFIX))
        self.size = 0
        self.next_offset = self.base
        self._file = path.open("rb")
        self._lock = threading.Lock()
        self._index: list[tuple[int, int]] = []  # (offset, byte), one every 64 KiB that was walked over
        self._indexed = 0

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def grew(self, offset: int, at: int, end: int) -> None:
        """The writer put a record `offset` at byte `at`, up to byte `end`."""
        self._note(offset, at)
        self.size, self.next_offset = end, offset + 1

    def scan(self) -> int:
        """Walks the whole file -> bytes of whole records; what follows them is a torn tail."""
        for record, end in self.walk(self.base, self.file_bytes):
            self.size, self.next_offset = end, record.offset + 1
        return self.size

    def records(self, start: int, until: int | None = None) -> Iterator[LogRecord]:
        """Records from offset `start`, of the first `until` bytes; EventError at a damaged one.

        Without `until` the file may be growing under another process: a torn tail ends the reading.
        """
        limit = self.file_bytes if until is None else until
        for record, _ in self.walk(start, limit, whole=until is not None):
            yield record

    def walk(self, start: int, limit: int, *, whole: bool = False) -> Iterator[tuple[LogRecord, int]]:
        """Records from `start` with the byte each ends at. A torn or damaged one ends it, or, if `whole`, raises."""
        at = self._place(start)
        buffer, begin = b"", at
        while at < limit:
            if at - begin + _HEAD.size > len(buffer):
                buffer, begin = os.pread(self._file.fileno(), _READ, at), at
            if len(buffer) - (at - begin) < _HEAD.size:
                break
            length, crc = _HEAD.unpack_from(buffer, at - begin)
            if not _BODY.size <= length <= MAX_RECORD:
                break
            need = _HEAD.size + length
            if at - begin + need > len(buffer):
                buffer, begin = os.pread(self._file.fileno(), max(_READ, need), at), at
            body = buffer[at - begin + _HEAD.size : at - begin + need]
            if len(body) < length or zlib.crc32(body) != crc:
                break
            offset, key_length = _BODY.unpack_from(body)
            self._note(offset, at)
            at += need
            if offset >= start:
                split = _BODY.size + key_length
                key = body[_BODY.size : split].decode(errors="replace")
                yield LogRecord(self.partition, offset, key, body[split:]), at
        if whole and at < limit:
            raise EventError(f"{self.path}: damaged at byte {at}: a record does not match its checksum")

    def _place(self, offset: int) -> int:
        """A byte at or before the record `offset`, where a record starts."""
        spot = bisect_right(self._index, (offset, 1 << 62)) - 1
        return self._index[spot][1] if spot >= 0 else 0

    def _note(self, offset: int, at: int) -> None:
        if at >= self._indexed:
            with self._lock:
                if at >= self._indexed:
                    self._index.append((offset, at))
                    self._indexed = at + _INDEX_EVERY
