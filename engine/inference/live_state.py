"""The state page of a live folder: which generation, dense part and version are in use.

One process writes it, any number read it, none takes a lock. Two records take turns; each has a number that grows and a
checksum, and the newest whole one counts. So a reader need not wait while one is written, and a writer that is killed
meanwhile leaves the other.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path

from engine.bundle import Bundle
from engine.errors import BundleError, PlexrankError
from engine.files import write_whole

NAME = "state"
_PAGE = 4096
_HEADER = struct.Struct("<8s16s32s64s64s")
_MAGIC = b"PXLIVE1\0"
_RECORD = struct.Struct("<QQQQQQI")
_RECORDS, _EACH = 1024, 64
_DIRTY = 2048
_WRITER = struct.Struct("<Qd")
_WRITER_AT = 3072
_TRIES = 1000
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Record:
    """number: grows by one a record. generation: of `gen-<generation>`. epoch, sequence: where the chain stands.

    dense: of the dense part, counted in its generation; dense_bytes, dense_crc: its length and zlib.crc32.
    """

    number: int
    generation: int
    epoch: int
    sequence: int
    dense: int
    dense_bytes: int
    dense_crc: int

    @classmethod
    def of(
        cls, number: int, generation: int, data: bytes, *, dense: int = 0, epoch: int = 0, sequence: int = 0
    ) -> Record:
        """data: of the dense part."""
        return cls(number, generation, epoch, sequence, dense, len(data), zlib.crc32(data))

    @property
    def slot(self) -> int:
        """Which of the two files holds the dense part."""
        return self.dense % 2


class StatePage:
    """Mapped. BundleError where it is another bundle's; None from `open` where there is none that can be used."""

    def __init__(self, path: Path, memory: mmap.mmap, inode: int) -> None:
        self.path, self._memory, self._inode = path, memory, inode

    @classmethod
    def create(cls, folder: Path, bundle: Bundle, record: Record) -> None:
        """There whole or not at all. OSError where it cannot be written."""
        page = bytearray(_PAGE)
        names = bundle.name.encode(), bundle.version.encode()
        _HEADER.pack_into(page, 0, _MAGIC, _boot(), bytes.fromhex(bundle.manifest.digest), *names)
        at = _place(record.number)
        page[at : at + _EACH] = _packed(record)
        write_whole(folder / NAME, bytes(page), durable=False)

    @classmethod
    def open(cls, folder: Path, bundle: Bundle, *, writable: bool = False) -> StatePage | None:
        """None: no page, a damaged one, another format's, or one of before the machine was started (what was mapped
        then may have come to the disk in part). OSError where it cannot be read."""
        path = folder / NAME
        try:
            file = path.open("r+b" if writable else "rb")
        except FileNotFoundError:
            return None
        with file:
            found = os.fstat(file.fileno())
            if found.st_size != _PAGE:
                return None
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            page = cls(path, mmap.mmap(file.fileno(), _PAGE, access=access), found.st_ino)
        magic, boot, digest, name, version = _HEADER.unpack_from(page._memory)
        if (magic, boot) != (_MAGIC, _boot()) or page.newest() is None:
            return None
        if digest.hex() != bundle.manifest.digest:
            its = " ".join(text.rstrip(b"\0").decode(errors="replace") for text in (name, version))
            raise BundleError(
                f"{folder}: the live memory of another bundle, {its} (manifest {digest.hex()[:12]}), not of "
                f"{bundle.name} {bundle.version} ({bundle.manifest.digest[:12]}): each bundle needs a folder of its own"
            )
        return page

    # ---------------------------------------------------------------------------------------------- reading
    def raw(self) -> bytes:
        """Both records as they are; equal bytes: nothing happened."""
        return self._memory[_RECORDS : _RECORDS + 2 * _EACH]

    def newest(self) -> Record | None:
        """None where no record is whole: neither was ever, or the writer wrote both while this one looked."""
        raw = self.raw()
        found = [_unpacked(raw[:_EACH]), _unpacked(raw[_EACH:])]
        return max((r for r in found if r is not None), key=lambda r: r.number, default=None)

    def read(self) -> Record:
        """The newest record. PlexrankError where there is none: the page was written over."""
        for _ in range(_TRIES):
            found = self.newest()
            if found is not None:
                return found
            time.sleep(0)
        raise PlexrankError(f"{self.path}: damaged: stop what uses {self.path.parent}, remove it and begin again")

    @property
    def in_place(self) -> bool:
        """Whether the file under this name is still the one that is mapped."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except OSError:
            return False

    @property
    def dirty(self) -> bool:
        """Whether rows are being written, or a writer was stopped while it wrote some."""
        return self._memory[_DIRTY] != 0

    @dirty.setter
    def dirty(self, dirty: bool) -> None:
        self._memory[_DIRTY] = int(dirty)

    @property
    def writer(self) -> tuple[int, float]:
        """Its process, 0 before the first; when it was last heard of, seconds since 1970."""
        pid, beat = _WRITER.unpack_from(self._memory, _WRITER_AT)
        return pid, beat

    # ---------------------------------------------------------------------------------------------- writing
    def write(self, record: Record) -> None:
        """In the place of the record before the last."""
        at = _place(record.number)
        self._memory[at : at + _EACH] = _packed(record)

    def beat(self) -> None:
        """This process is the writer, and alive."""
        self._memory[_WRITER_AT : _WRITER_AT + _WRITER.size] = _WRITER.pack(os.getpid(), time.time())


def _place(number: int) -> int:
    return _RECORDS + number % 2 * _EACH


def _packed(record: Record) -> bytes:
    fields = _RECORD.pack(*astuple(record))
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(_EACH, b"\0")


def _unpacked(raw: bytes) -> Record | None:
    fields = raw[: _RECORD.size]
    (checksum,) = struct.unpack_from("<I", raw, _RECORD.size)
    record = Record(*_RECORD.unpack(fields))
    return record if record.number > 0 and checksum == zlib.crc32(fields) else None


def _boot() -> bytes:
    """Names this start of the machine; the same everywhere where nothing names it."""
    try:
        return bytes.fromhex(_BOOT.read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)
