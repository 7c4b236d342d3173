"""A generation of a live folder: files that every process of the machine maps, so that it holds them once.

`gen-<k>/tables` and `items`: arrays, float32 but for quantised tables, written in place. `dense-0`, `dense-1`: the
dense part with the calibration as safetensors, in turns; a reader knows by length and checksum whether it read what it
wanted. `layout.json`: what lies where.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.errors import PlexrankError
from engine.inference.quantised import quantised
from engine.item_side import HeldItems
from engine.streaming.learning.recalibration import PREFIX
from engine.training.calibration import Calibration

TABLES, ITEMS, LAYOUT = "tables", "items", "layout.json"
_ALIGNED = 4096
_COPIED = 1 << 22
"""Numbers that are copied together."""
_SPARE = 1 << 16
"""Bytes that a dense part may grow by: a calibration has more knots than the one before."""


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows behind one another. dtype uint8: a table as `engine.inference.quantised` makes them."""

    offset: int
    shape: tuple[int, int]
    dtype: Literal["float32", "uint8"] = "float32"

    @property
    def end(self) -> int:
        return self.offset + np.dtype(self.dtype).itemsize * math.prod(self.shape)


class ItemsLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of `engine.item_side.HeldItems`."""

    vectors: Array
    dense: Array
    widths: dict[str, int]
    shared: dict[str, str]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """items: None where vectors of items are not kept."""

    tables: dict[str, Array]
    items: ItemsLayout | None = None


@dataclass(frozen=True)
class DensePart:
    """All of a model's state but its tables, by their names there; task -> calibration."""

    state: Mapping[str, Tensor]
    calibration: Mapping[str, Calibration]

    def encoded(self) -> bytes:
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.state.items()}
        for task, its in self.calibration.items():
            tensors |= its.to_tensors(f"{PREFIX}{task}.")
        return save(tensors)

    @classmethod
    def decoded(cls, data: bytes) -> DensePart:
        """PlexrankError where it is none."""
        try:
            tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
            raise PlexrankError(f"a dense part cannot be read as safetensors: {error}") from None
        its = {name for name in tensors if name.startswith(PREFIX)}
        tasks = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in its})
        calibration = {task: Calibration.from_tensors(tensors, f"{PREFIX}{task}.") for task in tasks}
        return cls({name: tensor for name, tensor in tensors.items() if name not in its}, calibration)


@dataclass(frozen=True)
class Generation:
    """Mapped. tables: table -> float32 [rows, dim], or quantised. items: None where they are not kept."""

    path: Path
    layout: Layout
    tables: Mapping[str, Tensor]
    items: HeldItems | None

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Generation:
        """FileNotFoundError where the writer has gone on to a newer one; PlexrankError where it is damaged.

        Without `writable` the memory is read-only: who writes to a tensor of it ends its process.
        """
        try:
            layout = msgspec.json.decode((path / LAYOUT).read_bytes(), type=Layout)
        except msgspec.DecodeError as error:
            raise PlexrankError(f"{path / LAYOUT}: {error}: stop what uses {path.parent} and remove it") from None
        tables = mapped(path / TABLES, layout.tables, writable=writable)
        if layout.items is None:
            return cls(path, layout, tables, None)
        its = layout.items
        arrays = mapped(path / ITEMS, {"vectors": its.vectors, "dense": its.dense}, writable=writable)
        return cls(path, layout, tables, HeldItems(arrays["vectors"], arrays["dense"], its.widths, its.shared))

    def read_dense(self, slot: int, length: int, checksum: int) -> bytes | None:
        """None where the writer has written another over it meanwhile."""
        with (self.path / f"dense-{slot}").open("rb") as file:
            data = file.read(length)
        return data if len(data) == length and zlib.crc32(data) == checksum else None

    def write_dense(self, slot: int, data: bytes) -> None:
        """Over the one before the last. OSError where there is no room for it; nothing was written then."""
        path = self.path / f"dense-{slot}"
        if path.stat().st_size < len(data):
            allocate(path, len(data) + _SPARE)
        with path.open("r+b") as file:
            file.write(data)


def placed(shapes: Mapping[str, tuple[int, int]], dtype: Literal["float32", "uint8"] = "float32") -> dict[str, Array]:
    """Where arrays of these shapes lie in a file, each at the beginning of a page."""
    found, end = {}, 0
    for name, shape in shapes.items():
        found[name] = Array(-(-end // _ALIGNED) * _ALIGNED, shape, dtype)
        end = found[name].end
    return found


def allocate(path: Path, length: int) -> None:
    """A file of that length of which every block is the file's own: to write to a mapped page that the disk has no room
    for would end the process. OSError (ENOSPC) where there is no room."""
    with path.open("ab") as file:
        if length:
            os.posix_fallocate(file.fileno(), 0, length)


def allocate_arrays(path: Path, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """A file for these arrays, zeros, mapped."""
    allocate(path, max((a.end for a in arrays.values()), default=0))
    return mapped(path, arrays, writable=True)


def allocate_dense(path: Path, data: bytes) -> None:
    """Both slots of a generation that is being made, the first with this dense part."""
    for slot in (0, 1):
        allocate(path / f"dense-{slot}", len(data) + _SPARE)
    with (path / "dense-0").open("r+b") as file:
        file.write(data)


def mapped(path: Path, arrays: Mapping[str, Array], *, writable: bool) -> dict[str, Tensor]:
    """The arrays of a file, in memory that is shared with all that map it. PlexrankError where it is shorter
    than they are."""
    size, wanted = path.stat().st_size, max((a.end for a in arrays.values()), default=0)
    if size < wanted:
        raise PlexrankError(f"{path}: truncated: {size:,} bytes of {wanted:,}: stop what uses it and remove its folder")
    if not wanted:
        return {n: torch.from_numpy(np.empty(array.shape, array.dtype)) for n, array in arrays.items()}
    with path.open("r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        memory = mmap.mmap(file.fileno(), size, access=access)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no tensors that are read-only; nothing here writes to a reader's
        for name, array in arrays.items():
            count = math.prod(array.shape)
            flat = np.frombuffer(memory, array.dtype, count, array.offset) if count else np.empty(0, array.dtype)
            found[name] = torch.from_numpy(flat).reshape(array.shape)
    return found


def copy_table(source: Tensor, target: Tensor) -> None:
    """float32 [rows, dim] into a table of that kind, or into a quantised one."""
    if target.dtype == torch.float32:
        copy(source, target)
        return
    with torch.no_grad():
        for start in range(0, len(source), _COPIED // 64):
            some = slice(start, start + _COPIED // 64)
            target[some].copy_(quantised(source[some]))


def copy(source: Tensor, target: Tensor) -> None:
    """float32 of one shape, contiguous, some MiB at a time."""
    ours, theirs = target.reshape(-1), source.reshape(-1)
    with torch.no_grad():
        for start in range(0, len(theirs), _COPIED):
            ours[start : start + _COPIED].copy_(theirs[start : start + _COPIED])


@contextmanager
def naming(folder: Path, what: str) -> Iterator[None]:
    """What the system says of files, as an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise PlexrankError(
            f"{folder}: {what}: {error.strerror or error}: the live memory needs a folder that can be written to, with "
            "room for two copies of the model's tables and items' vectors"
        ) from error
