"""One file of the log: records behind one another, each with its length and checksum.

The file begins with `plexlog` and the format's number, one byte. A record of format 2 is `length u32 | crc32 u32 |
offset u64 | seconds f64 | key length u32 | headers length u32 | key | headers | value`, little endian; length counts
what follows the checksum, and the checksum covers it; seconds is when the log took it (NaN: not known); a header is
`name length u32 | value length u32 | name | value`. The file's name is the offset of its first record. Format 1 had no
beginning, no seconds and no headers; it is read and no longer written.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.components import LogRecord
from engine.errors import EventError

_HEAD = struct.Struct("<II")
_BODY_1 = struct.Struct("<QI")
_BODY = struct.Struct("<QdII")
_HEADER = struct.Struct("<II")
_MARK = b"plexlog"  # as a length it would pass MAX_RECORD, so no file of format 1 begins like this
FORMAT = 2
BEGINNING = _MARK + bytes([FORMAT])
SUFFIX = ".log"
MAX_RECORD = 16 << 20
_INDEX_EVERY = 64 << 10
_READ = 1 << 20


def encode(
    offset: int,
    key: bytes,
    value: bytes,
    seconds: float | None = None,
    headers: Sequence[tuple[str, bytes]] = (),
) -> bytes:
    """The bytes of one record. EventError if it is larger than 16 MiB."""
    packed = b"".join(_HEADER.pack(len(n := name.encode()), len(data)) + n + data for name, data in headers)
    time = math.nan if seconds is None else seconds
    body = _BODY.pack(offset, time, len(key), len(packed)) + key + packed + value
    if len(body) > MAX_RECORD:
        raise EventError(f"an event of {len(body)} bytes is larger than the log takes ({MAX_RECORD})")
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def _decode(partition: int, body: bytes) -> LogRecord:
    """The record of a format 2 body whose checksum was right."""
    offset, seconds, key_length, headers_length = _BODY.unpack_from(body)
    split = _BODY.size + key_length
    end = split + headers_length
    headers = _headers(body[split:end]) if headers_length else ()
    time = None if math.isnan(seconds) else seconds
    return LogRecord(partition, offset, body[_BODY.size : split].decode(errors="replace"), body[end:], time, headers)


def _headers(packed: bytes) -> tuple[tuple[str, bytes], ...]:
    found, at = [], 0
    while at < len(packed):
        name_length, length = _HEADER.unpack_from(packed, at)
        split = at + _HEADER.size + name_length
        found.append((packed[at + _HEADER.size : split].decode(errors="replace"), packed[split : split + length]))
        at = split + length
    return tuple(found)


def _decode_1(partition: int, body: bytes) -> LogRecord:
    offset, key_length = _BODY_1.unpack_from(body)
    split = _BODY_1.size + key_length
    return LogRecord(partition, offset, body[_BODY_1.size : split].decode(errors="replace"), body[split:])


class Segment:
    """A readable file of records. It keeps its descriptor, so a compaction may replace the file under a reader.

    `size`: bytes up to the end of the last whole record, `next_offset`: the offset after the last; kept by the writer,
    or found by `scan`. EventError where the file is of a format that this version does not know.
    """

    def __init__(self, path: Path, partition: int) -> None:
        self.path = path
        self.partition = partition
        self.base = int(path.name.removesuffix(SUFFIX))
        self._file = path.open("rb")
        self.inode = os.fstat(self._file.fileno()).st_ino
        mark = os.pread(self._file.fileno(), len(BEGINNING), 0)
        self.format = mark[len(_MARK)] if len(mark) == len(BEGINNING) and mark.startswith(_MARK) else 1
        if self.format not in (1, FORMAT):
            raise EventError(
                f"{path}: written in format {self.format}, and this version reads up to {FORMAT}: take a newer plexrank"
            )
        self.begins = len(BEGINNING) if self.format == FORMAT else 0
        self._least, self._record = (_BODY.size, _decode) if self.format == FORMAT else (_BODY_1.size, _decode_1)
        self.size = self.begins
        self.next_offset = self.base
        self._lock = threading.Lock()
        self._index: list[tuple[int, int]] = []  # (offset, byte), one every 64 KiB that was walked over
        self._indexed = 0

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def replaced(self) -> bool:
        """Whether another file has its name now."""
        try:
            return self.path.stat().st_ino != self.inode
        except FileNotFoundError:
            return False

    def grew(self, offset: int, at: int, end: int) -> None:
        """The writer put a record `offset` at byte `at`, up to byte `end`."""
        self._note(offset, at)
        self.size, self.next_offset = end, offset + 1

    def scan(self) -> int:
        """Walks on to the end of the file -> bytes of whole records; what follows them is a torn tail."""
        for record, end in self.walk(self.base, self.file_bytes, at=self.size):
            self.size, self.next_offset = end, record.offset + 1
        return self.size

    def records(self, start: int, until: int | None = None) -> Iterator[LogRecord]:
        """Records from offset `start`, of the first `until` bytes; EventError at a damaged one.

        Without `until` the file may be growing under another process: a torn tail ends the reading.
        """
        limit = self.file_bytes if until is None else until
        for record, _ in self.walk(start, limit, whole=until is not None):
            yield record

    def walk(
        self, start: int, limit: int, *, whole: bool = False, at: int | None = None
    ) -> Iterator[tuple[LogRecord, int]]:
        """Records from offset `start` with the byte each ends at, walking from byte `at` where that is known.

        A torn or damaged one ends it, or, if `whole`, raises.
        """
        at = self.place(start) if at is None else at
        buffer, begin = b"", at
        while at < limit:
            if at - begin + _HEAD.size > len(buffer):
                buffer, begin = os.pread(self._file.fileno(), min(_READ, limit - at), at), at
            if len(buffer) - (at - begin) < _HEAD.size:
                break
            length, crc = _HEAD.unpack_from(buffer, at - begin)
            if not self._least <= length <= MAX_RECORD:
                break
            need = _HEAD.size + length
            if at - begin + need > len(buffer):
                buffer, begin = os.pread(self._file.fileno(), max(min(_READ, limit - at), need), at), at
            body = buffer[at - begin + _HEAD.size : at - begin + need]
            if len(body) < length or zlib.crc32(body) != crc:
                break
            record = self._record(self.partition, body)
            self._note(record.offset, at)
            at += need
            if record.offset >= start:
                yield record, at
        if whole and at < limit:
            raise EventError(f"{self.path}: damaged at byte {at}: a record does not match its checksum")

    def place(self, offset: int) -> int:
        """A byte at or before the record `offset`, where a record starts."""
        spot = bisect_right(self._index, (offset, 1 << 62)) - 1
        return self._index[spot][1] if spot >= 0 else self.begins

    def _note(self, offset: int, at: int) -> None:
        if at >= self._indexed:
            with self._lock:
                if at >= self._indexed:
                    self._index.append((offset, at))
                    self._indexed = at + _INDEX_EVERY
