"""Which keys were erased from a partition, and up to which offset. The key itself is not kept, only its digest."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from engine.files import sync

_FILE = "erased"
_DIGEST, _OFFSET = 16, 8


def digest(key: str) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST).digest()


class Tombstones:
    """digest -> offset before which that key's records are gone. Durable when `add` returns.

    The file (24 bytes a key: digest, offset) is replaced as a whole, so it is never torn.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._lock = threading.Lock()
        self.marks: dict[bytes, int] = {}
        if self._path.exists():
            data = self._path.read_bytes()
            step = _DIGEST + _OFFSET
            for at in range(0, len(data) - len(data) % step, step):
                offset = data[at + _DIGEST : at + step]
                self.marks[data[at : at + _DIGEST]] = int.from_bytes(offset, "little")

    def hides(self, key: str, offset: int) -> bool:
        """Whether a record of this key at this offset was erased."""
        marks = self.marks
        return bool(marks) and offset < marks.get(digest(key), 0)

    def add(self, key: str, end: int) -> None:
        """Records of `key` before offset `end` are erased from now on."""
        with self._lock:
            self._replace({**self.marks, digest(key): end})

    def drop(self, done: Mapping[bytes, int]) -> None:
        """Forgets tombstones whose records no file holds any more, unless they were set anew meanwhile."""
        with self._lock:
            self._replace({mark: end for mark, end in self.marks.items() if done.get(mark) != end})

    def _replace(self, marks: dict[bytes, int]) -> None:
        temporary = self._path.with_name(f"{_FILE}.new")
        with temporary.open("wb") as file:
            file.write(b"".join(mark + end.to_bytes(_OFFSET, "little") for mark, end in marks.items()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync(self._path.parent)
        self.marks = marks
