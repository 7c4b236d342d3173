"""Encoded features of many things, by row; rows are freed and used again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.data.encoder import Values
from engine.data.encoding import Encoded, ranges
from engine.schema import FeatureSpec


class FeatureRows:
    """A matrix of ids, a matrix of numbers, and behind one another the values of features that have any number.

    top: rows that were ever used at a time; so many places an array beside this one needs.
    """

    def __init__(self, features: Sequence[FeatureSpec]) -> None:
        self._fixed = [f.name for f in features if not f.is_dense and not f.is_jagged]
        self._dense = [f.name for f in features if f.is_dense]
        self._jagged = {f.name: _Jagged() for f in features if f.is_jagged}
        self._ids = np.empty((16, len(self._fixed)), np.int64)
        self._numbers = np.empty((16, len(self._dense)), np.float32)
        self._free = np.empty(16, np.int64)  # a stack
        self._freed = 0
        self.top = 0

    def __len__(self) -> int:
        return self.top - self._freed

    def put(self, encoded: Mapping[str, Encoded], count: int) -> np.ndarray:
        """`count` more things -> their rows int64 [count], those freed last first."""
        again = min(count, self._freed)
        self._freed -= again
        old = self._free[self._freed : self._freed + again][::-1]
        rows = np.concatenate([old, np.arange(self.top, self.top + count - again)])
        self.top += count - again
        self._ids, self._numbers = longer(self._ids, self.top), longer(self._numbers, self.top)
        for j, name in enumerate(self._fixed):
            self._ids[rows, j] = encoded[name].values
        for j, name in enumerate(self._dense):
            self._numbers[rows, j] = encoded[name].values
        for name, jagged in self._jagged.items():
            jagged.put(rows, encoded[name])
        return rows

    def take(self, rows: np.ndarray, ids: dict[str, Values], numbers: dict[str, np.ndarray]) -> None:
        """Adds the features of rows int64 [n], as `FeatureEncoder.assemble` takes them."""
        if self._fixed:
            columns = np.ascontiguousarray(self._ids[rows].T)
            ids |= {name: (columns[j], None) for j, name in enumerate(self._fixed)}
        if self._dense:
            dense = self._numbers[rows]
            numbers |= {name: dense[:, j] for j, name in enumerate(self._dense)}
        for name, jagged in self._jagged.items():
            ids[name] = jagged.take(rows)

    def free(self, rows: np.ndarray) -> None:
        """Rows int64 [n], distinct, that may be used again."""
        self._free = longer(self._free, self._freed + len(rows))
        self._free[self._freed : self._freed + len(rows)] = rows
        self._freed += len(rows)
        for jagged in self._jagged.values():
            jagged.free(rows)

    def used(self) -> np.ndarray:
        """Rows in use, int64, ascending."""
        used = np.ones(self.top, bool)
        used[self._free[: self._freed]] = False
        return np.flatnonzero(used)

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        used = self.used()
        state = {
            f"{prefix}.free": self._free[: self._freed].copy(),
            f"{prefix}.top": np.array([self.top]),
            f"{prefix}.ids": self._ids[used],
            f"{prefix}.numbers": self._numbers[used],
        }
        for name, jagged in self._jagged.items():
            values, lengths = jagged.take(used)
            state |= {f"{prefix}.{name}.values": values, f"{prefix}.{name}.lengths": lengths}
        return state

    def load(self, prefix: str, state: Mapping[str, np.ndarray]) -> None:
        self._free, self.top = np.array(state[f"{prefix}.free"], np.int64), int(state[f"{prefix}.top"][0])
        self._freed = len(self._free)
        self._free = longer(self._free, 16)
        used = self.used()
        self._ids = np.zeros((max(16, self.top), len(self._fixed)), np.int64)
        self._numbers = np.zeros((max(16, self.top), len(self._dense)), np.float32)
        self._ids[used] = state[f"{prefix}.ids"]
        self._numbers[used] = state[f"{prefix}.numbers"]
        for name in self._jagged:
            lengths = np.asarray(state[f"{prefix}.{name}.lengths"], np.int64)
            self._jagged[name] = jagged = _Jagged()
            jagged.put(used, Encoded(state[f"{prefix}.{name}.values"], np.concatenate([[0], np.cumsum(lengths)])))


class _Jagged:
    """Any number of values a row; those of freed rows are squeezed out when they are the greater part."""

    def __init__(self) -> None:
        self._values = np.empty(64, np.int64)
        self._end = 0
        self._live = 0
        self._start = np.zeros(16, np.int64)
        self._length = np.zeros(16, np.int64)

    def put(self, rows: np.ndarray, encoded: Encoded) -> None:
        if not len(rows):
            return
        offsets = encoded.offsets
        assert offsets is not None
        if self._end + len(encoded.values) > len(self._values) and self._end > 2 * self._live:
            self._squeeze()
        most = int(rows.max()) + 1
        self._start, self._length = longer(self._start, most), longer(self._length, most)
        self._values = longer(self._values, self._end + len(encoded.values))
        self._values[self._end : self._end + len(encoded.values)] = encoded.values
        self._start[rows] = self._end + offsets[:-1]
        self._length[rows] = np.diff(offsets)
        self._end += len(encoded.values)
        self._live += len(encoded.values)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self._length[rows]
        return self._values[ranges(self._start[rows], lengths)], lengths

    def free(self, rows: np.ndarray) -> None:
        self._live -= int(self._length[rows].sum())
        self._length[rows] = 0

    def _squeeze(self) -> None:
        rows = np.flatnonzero(self._length)
        values, lengths = self.take(rows)
        self._values[: len(values)] = values
        self._start[rows] = np.cumsum(lengths) - lengths
        self._end = len(values)


def longer(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or where it is shorter than `size` one of twice the room that begins with it; new places are 0."""
    if size <= len(array):
        return array
    wider = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    wider[: len(array)] = array
    return wider
