"""Which items of a catalogue read which rows of a table: what has to be made anew where rows were changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from engine.data.encoding import ranges

Pairs = tuple[np.ndarray, np.ndarray]
"""Rows int64 [p] of a table, ascending, and the items int64 [p] that read them."""

_FEW = 1024
"""Pairs that came since, for which all are not sorted again."""
_NONE: Pairs = (np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class ItemReaders:
    """Of one feature. Items that changed are named for the rows they read before, too: to renew one more is no harm.

    most: pairs of the catalogue that was given first; more: of items that came or changed since. Sorting is for those
    alone until they are an eighth as many.
    """

    table: str
    most: Pairs
    more: Pairs = _NONE

    @classmethod
    def of(cls, table: str, parts: Iterable[Pairs]) -> Self:
        """From pairs in any order."""
        return cls(table, _sorted(*(np.concatenate(column) for column in zip(*parts, strict=True))))

    def with_more(self, rows: np.ndarray, items: np.ndarray) -> Self:
        """Pairs int64 [p] in any order."""
        more = np.concatenate([self.more[0], rows]), np.concatenate([self.more[1], items])
        if len(more[0]) > max(_FEW, len(self.most[0]) // 8):
            return type(self)(
                self.table,
                _sorted(np.concatenate([self.most[0], more[0]]), np.concatenate([self.most[1], more[1]])),
            )
        return type(self)(self.table, self.most, _sorted(*more))

    def reading(self, rows: np.ndarray, items: int) -> np.ndarray:
        """Rows int64 [n], distinct -> items int64 [m] below `items` that read one of them, ascending, distinct."""
        touched = np.zeros(items, dtype=bool)
        for known, their in (self.most, self.more):
            first = np.searchsorted(known, rows, side="left")
            touched[their[ranges(first, np.searchsorted(known, rows, side="right") - first)]] = True
        return np.flatnonzero(touched)


def _sorted(rows: np.ndarray, items: np.ndarray) -> Pairs:
    order = np.argsort(rows, kind="stable")
    return rows[order], items[order]
