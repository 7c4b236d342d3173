"""Which row holds which id, where rows are only ever added or marked dead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

Run = tuple[np.ndarray, np.ndarray]
"""ids ascending, and their rows."""


@dataclass(frozen=True)
class Rows:
    """An immutable state of an append-only table; changing it gives a new one.

    ids int64 [n] by row; alive bool [n]; `old` and `new`: sorted runs that together cover all rows. Adding ids sorts
    only those since the last merge.
    """

    ids: np.ndarray
    alive: np.ndarray
    live: int
    old: Run
    new: Run

    @classmethod
    def of(cls, ids: np.ndarray) -> Self:
        """All rows alive; ids distinct."""
        empty = (np.empty(0, np.int64), np.empty(0, np.int64))
        return cls(ids, np.ones(len(ids), bool), len(ids), _run(ids, 0), empty)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.ids, self.alive, *self.old, *self.new))

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Rows (int64, any number) of those of these distinct ids that are alive."""
        return np.concatenate([self._find(run, ids) for run in (self.old, self.new)])

    def _find(self, run: Run, ids: np.ndarray) -> np.ndarray:
        known, rows = run
        first = np.searchsorted(known, ids, side="left")
        count = np.searchsorted(known, ids, side="right") - first  # an id may have several dead rows
        places = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        found = rows[places]
        return found[self.alive[found]]

    def without(self, ids: np.ndarray) -> Self:
        """These ids' rows dead; unknown ids are no fault."""
        gone = self.find(np.unique(ids))
        if not len(gone):
            return self
        alive = self.alive.copy()
        alive[gone] = False
        return type(self)(self.ids, alive, self.live - len(gone), self.old, self.new)

    def with_more(self, ids: np.ndarray) -> Self:
        """Rows for these ids behind the last; none of them may be alive."""
        every = np.concatenate([self.ids, ids])
        alive = np.concatenate([self.alive, np.ones(len(ids), bool)])
        sorted_before = len(self.old[0])
        if len(every) - sorted_before > max(1024, sorted_before // 8):
            return type(self)(every, alive, self.live + len(ids), _run(every, 0), _run(every[:0], 0))
        return type(self)(every, alive, self.live + len(ids), self.old, _run(every[sorted_before:], sorted_before))


def _run(ids: np.ndarray, first_row: int) -> Run:
    order = np.argsort(ids, kind="stable")
    return ids[order], order + first_row
