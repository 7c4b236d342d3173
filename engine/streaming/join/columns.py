"""Columns that grow at their end: arrays of one length, room doubled when it runs out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Columns:
    """name -> array [n], all of one n. `columns[name]` is a view that the next `append` or `keep` may leave behind."""

    def __init__(self, **dtypes: type | np.dtype) -> None:
        self._room = {name: np.empty(16, dtype) for name, dtype in dtypes.items()}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, name: str) -> np.ndarray:
        return self._room[name][: self._size]

    def append(self, count: int, **values: np.ndarray | float | bool) -> None:
        """`count` more rows; each column is given, as an array or as one value for all."""
        begin, end = self._size, self._size + count
        for name, room in self._room.items():
            if end > len(room):
                wider = np.empty(max(end, 2 * len(room)), room.dtype)
                wider[:begin] = room[:begin]
                self._room[name] = room = wider
            room[begin:end] = values[name]
        self._size = end

    def keep(self, rows: np.ndarray) -> None:
        """Only these rows (bool [n], or int64 places in ascending order); room that is no longer needed goes back."""
        kept = {name: self[name][rows] for name in self._room}
        self._size = len(next(iter(kept.values())))
        self._room = {name: column if len(column) else np.empty(16, column.dtype) for name, column in kept.items()}

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        return {f"{prefix}.{name}": self[name].copy() for name in self._room}

    def load(self, prefix: str, state: Mapping[str, np.ndarray]) -> None:
        loaded = {name: np.array(state[f"{prefix}.{name}"], room.dtype) for name, room in self._room.items()}
        self._size = len(next(iter(loaded.values())))
        self._room = {name: column if len(column) else np.empty(16, column.dtype) for name, column in loaded.items()}
