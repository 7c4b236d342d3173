"""The deltas of a chain as files, for replicas that start late or miss a record of the log.

A file holds the parts that the log got, each behind its length (uint32, little endian). When there are many, the older
half becomes one file, which holds each row once: the folder is bounded by the model, not by time, and a bundle with
these files is the whole chain, however old. Where a file is damaged the chain has a gap, until the next bundle.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BundleError
from engine.files import write_whole
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, merge
from engine.streaming.deltas.delta_codec import MOST_PAYLOAD, encode

MOST_FILES = 128

_NAME = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})\+(\d{1,18})\.(\d{1,18})\.delta")


@dataclass(frozen=True)
class DeltaFile:
    """One file; sequence: of the (last) delta in it."""

    path: Path
    base: str
    epoch: int
    sequence: int

    def read(self) -> tuple[Delta, int] | None:
        """The delta and its bytes; None where it was removed meanwhile. BundleError for a damaged one."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BundleError(f"{self.path}: {error.strerror or error}") from None
        assembler = Assembler()
        delta = None
        for part in _split(raw, self.path):
            delta = assembler.add(part) or delta
        if delta is None:
            raise BundleError(f"{self.path}: a part is missing")
        if (delta.base, delta.epoch, delta.sequence) != (self.base, self.epoch, self.sequence):
            raise BundleError(f"{self.path}: holds {delta.version}")
        return delta, len(raw)


class DeltaFiles:
    """A folder of them; one process writes, others read."""

    def __init__(self, folder: Path, most_files: int = MOST_FILES) -> None:
        self.folder, self.most_files = Path(folder), most_files

    def write(self, delta: Delta, parts: Sequence[bytes]) -> None:
        """Adds one, whole or not at all (OSError). It is not synced: the log is what must outlive a power cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        framed = b"".join(piece for part in parts for piece in (struct.pack("<I", len(part)), part))
        write_whole(self.folder / f"{delta.base}+{delta.epoch}.{delta.sequence}.delta", framed, durable=False)

    def many(self, base: str, epoch: int) -> bool:
        """Whether it is time to `shrink`."""
        return len(self.of(base, epoch)) > self.most_files

    def shrink(self, base: str, epoch: int) -> None:
        """Makes the older half of a chain's files one, with the values that they have; then they are removed.

        Beside `write` in another thread; OSError leaves all as it was. BundleError: one is damaged or missing, and what
        lies behind it cannot be reached from the bundle.
        """
        chain = self.of(base, epoch)
        found: list[Delta] = []
        for file in chain[: len(chain) // 2]:
            read = file.read()
            reached = found[-1].sequence if found else 0
            if read is None or read[0].after > reached:
                raise BundleError(f"{file.path}: a delta between {reached} and {file.sequence} is missing")
            found.append(read[0])
        if len(found) < 2:
            return
        merged = merge(*found)
        self.write(merged, encode(merged, "float32", MOST_PAYLOAD))
        for file in chain[: len(found) - 1]:
            file.path.unlink(missing_ok=True)

    def of(self, base: str, epoch: int) -> list[DeltaFile]:
        """The files of one chain in order."""
        return sorted((f for f in self._all() if (f.base, f.epoch) == (base, epoch)), key=lambda f: f.sequence)

    def after(self, base: str, epoch: int, sequence: int) -> Iterator[tuple[Delta, int]]:
        """The deltas behind a sequence with their bytes, in order, as far as they follow each other."""
        at = sequence
        for file in self.of(base, epoch):
            if file.sequence <= at:
                continue
            found = file.read()
            if found is None or found[0].after > at:
                return
            yield found
            at = file.sequence

    def newest(self, base: str, epoch: int) -> int:
        """The greatest sequence of a chain; 0 where there is none."""
        return max((f.sequence for f in self.of(base, epoch)), default=0)

    def newest_epoch(self, base: str) -> int:
        """The greatest epoch of a bundle's chains; 0 where there is none."""
        return max((f.epoch for f in self._all() if f.base == base), default=0)

    def prune(self, base: str, epoch: int) -> int:
        """Removes the files of all other chains -> how many."""
        gone = [f for f in self._all() if (f.base, f.epoch) != (base, epoch)]
        for file in gone:
            file.path.unlink(missing_ok=True)
        return len(gone)

    def _all(self) -> list[DeltaFile]:
        if not self.folder.is_dir():
            return []
        matches = [(p, _NAME.fullmatch(p.name)) for p in self.folder.iterdir()]
        return [DeltaFile(p, m[1], int(m[2]), int(m[3])) for p, m in matches if m is not None]


def _split(raw: bytes, path: Path) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise BundleError(f"{path}: truncated")
        (length,) = struct.unpack_from("<I", raw, at)
        if at + 4 + length > len(raw):
            raise BundleError(f"{path}: truncated")
        yield raw[at + 4 : at + 4 + length]
        at += 4 + length
