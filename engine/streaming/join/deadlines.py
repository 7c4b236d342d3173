"""A time for each row, and at once which lie before a limit and which come first."""

from __future__ import annotations

import numpy as np

_BLOCK = 256


class Deadlines:
    """float64 a row, in blocks that know their minimum, so that a question reads few of them. inf: no deadline."""

    def __init__(self, values: np.ndarray | None = None) -> None:
        self._size = 0
        self._blocks = np.full((1, _BLOCK), np.inf)
        self._least = np.full(1, np.inf)
        if values is not None:
            self.append(values)

    def append(self, values: np.ndarray) -> None:
        """Deadlines of the next rows."""
        begin, end = self._size, self._size + len(values)
        if end > self._blocks.size:
            blocks = np.full((max(-(-end // _BLOCK), 2 * len(self._blocks)), _BLOCK), np.inf)
            blocks[: len(self._blocks)] = self._blocks
            self._least = np.append(self._least, np.full(len(blocks) - len(self._blocks), np.inf))
            self._blocks = blocks
        self._blocks.reshape(-1)[begin:end] = values
        self._size = end
        if begin < end:
            touched = slice(begin // _BLOCK, (end - 1) // _BLOCK + 1)
            self._least[touched] = self._blocks[touched].min(axis=1)

    def set(self, rows: np.ndarray, values: np.ndarray | float) -> None:
        self._blocks.reshape(-1)[rows] = values
        touched = np.unique(rows // _BLOCK)
        self._least[touched] = self._blocks[touched].min(axis=1)

    def before(self, limit: float) -> np.ndarray:
        """Rows whose deadline is less than `limit`, int64, by deadline and then by row."""
        blocks = np.flatnonzero(self._least < limit)
        return self._in_order(blocks, self._blocks[blocks] < limit)

    def first(self, count: int) -> np.ndarray:
        """The `count` rows with the earliest deadlines (fewer where fewer have one), in that order."""
        blocks = np.flatnonzero(self._least < np.inf)
        if not count or not len(blocks):
            return np.empty(0, np.int64)
        if count < len(blocks):  # each of the first is in a block whose minimum is no later than the count-th minimum
            least = self._least[blocks]
            blocks = blocks[least <= _nth(least, count)]
        values = self._blocks[blocks]
        latest = min(_nth(values.reshape(-1), count), np.finfo(float).max)
        return self._in_order(blocks, values <= latest)[:count]

    def _in_order(self, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Rows of blocks [b] where `wanted`, bool [b, 256]."""
        block, place = np.nonzero(wanted)
        rows = blocks[block] * _BLOCK + place
        return rows[np.lexsort((rows, self._blocks.reshape(-1)[rows]))]


def _nth(values: np.ndarray, count: int) -> float:
    """The count-th smallest, inf where there are not so many."""
    return float(np.partition(values, count - 1)[count - 1]) if count <= len(values) else np.inf
