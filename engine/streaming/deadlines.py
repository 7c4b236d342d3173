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
        return self._in_order(np.flatnonzero(self._least < limit), limit)

    def first(self, count: int) -> np.ndarray:
        """The `count` rows with the earliest deadlines (fewer where fewer have one), in that order."""
        blocks = np.flatnonzero(self._least < np.inf)
        if count < len(blocks):  # each of the first is in a block whose minimum is no later than the count-th minimum
            least = self._least[blocks]
            blocks = blocks[least <= np.partition(least, count - 1)[count - 1]]
        return self._in_order(blocks, np.inf)[:count]

    def _in_order(self, blocks: np.ndarray, limit: float) -> np.ndarray:
        values = self._blocks[blocks]
        block, place = np.nonzero(values < limit)
        rows = blocks[block] * _BLOCK + place
        return rows[np.lexsort((rows, values[block, place]))]
