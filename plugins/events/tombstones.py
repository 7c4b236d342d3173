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

    The file (24 bytes a key: digest, offset) is replaced as a whole, so it is never torn. What was erased stays hidden
    for as long as this object lives, as a reader may still be under way in a file that a compaction has replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._lock = threading.Lock()
        self._read: tuple[int, int] | None = None
        self.marks: dict[bytes, int] = {}
        self._hidden: dict[bytes, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """What another process has written since."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        if self._read != (stat.st_ino, stat.st_mtime_ns):
            self._read = stat.st_ino, stat.st_mtime_ns
            data = self._path.read_bytes()
            step = _DIGEST + _OFFSET
            self._set(
                {
                    data[at : at + _DIGEST]: int.from_bytes(data[at + _DIGEST : at + step], "little")
                    for at in range(0, len(data) - len(data) % step, step)
                }
            )

    def hides(self, key: str, offset: int) -> bool:
        """Whether a record of this key at this offset was erased."""
        hidden = self._hidden
        return bool(hidden) and offset < hidden.get(digest(key), 0)

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
        self._set(marks)

    def _set(self, marks: dict[bytes, int]) -> None:
        self.marks, self._hidden = marks, {**self._hidden, **marks}
