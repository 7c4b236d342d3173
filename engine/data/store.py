"""A folder of plain arrays: written by appending or in place, read through memory maps."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from engine.errors import DataError

CHUNK = 1 << 18
"""Rows worked on at a time: what bounds the memory of every pass over the data."""


class Appender:
    """An array that grows by appending chunks to its file."""

    def __init__(self, store: Store, name: str, dtype: np.dtype[Any], width: int | None) -> None:
        self._store, self._name, self._dtype, self._width = store, name, dtype, width
        self._file: IO[bytes] = open(store.path(name), "wb")  # noqa: SIM115
        self.rows = 0

    def append(self, values: np.ndarray) -> None:
        """values: [n] or [n, width], cast to the array's type."""
        chunk = np.ascontiguousarray(values, dtype=self._dtype)
        self._file.write(chunk.data if chunk.size else b"")
        self.rows += len(chunk)

    def close(self) -> None:
        self._file.close()
        shape = [self.rows] if self._width is None else [self.rows, self._width]
        self._store.arrays[self._name] = (self._dtype.str, shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Store:
    """name -> array in one folder, with their types and shapes in `arrays.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, tuple[str, list[int]]] = {}
        self._open: dict[str, np.ndarray] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def appender(self, name: str, dtype: Any, width: int | None = None) -> Appender:
        """width None: a vector; else rows of that many columns."""
        return Appender(self, name, np.dtype(dtype), width)

    def create(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A writable array backed by its file, zeros at first."""
        kind = np.dtype(dtype)
        self.arrays[name] = (kind.str, list(shape))
        self._open.pop(name, None)
        size = int(np.prod(shape)) * kind.itemsize
        with open(self.path(name), "wb+") as file:
            if not size:
                return np.zeros(shape, kind)
            file.truncate(size)
            buffer = mmap.mmap(file.fileno(), size)
        return np.frombuffer(buffer, dtype=kind).reshape(shape)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, read-only through a memory map. DataError if its file is not as long as it should be."""
        array = self._open.get(name)
        if array is None:
            array = self._open[name] = self._map(name)
        return array

    def _map(self, name: str) -> np.ndarray:
        dtype, shape = self.arrays[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        path = self.path(name)
        if not path.exists() or path.stat().st_size != size:
            raise DataError(f"{path}: expected {size} bytes; remove the folder to prepare the data again")
        if not size:
            return np.zeros(shape, dtype)
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return np.frombuffer(buffer, dtype=dtype).reshape(shape)

    def drop(self, name: str) -> None:
        """Forgets an array that only the preparation needed, and removes its file."""
        self._open.pop(name, None)
        self.arrays.pop(name, None)
        self.path(name).unlink(missing_ok=True)

    def save(self) -> None:
        (self.folder / "arrays.json").write_text(json.dumps(self.arrays))

    @classmethod
    def open(cls, folder: Path) -> Self:
        store = cls(folder)
        for name, (dtype, shape) in json.loads((folder / "arrays.json").read_text()).items():
            store.arrays[name] = (dtype, shape)
        return store


def chunks(rows: int, size: int = CHUNK) -> Iterator[slice]:
    """[0, rows) in slices."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
