"""Columns of a catalogue with some rows replaced and more behind them; what was there is not touched.

What differs lies beside a column, so that a change costs what it says; it is written into the column before it is much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from engine.data.encoding import Encoded, is_missing, taken
from engine.schema import FeatureSpec

_BESIDE = 1024


def most_beside(rows: int) -> int:
    """How many rows may differ from a column of so many before they are written into it: each change copies them."""
    return max(_BESIDE, rows // 64)


@dataclass(frozen=True)
class Overlay:
    """Raw values of a feature that differ from the bundle's: rows int64 [k], ascending; values of any kind [k]."""

    rows: np.ndarray
    values: np.ndarray

    @classmethod
    def nothing(cls) -> Self:
        return cls(np.empty(0, np.int64), np.empty(0, object))

    def with_more(self, rows: np.ndarray, values: Sequence[Any]) -> Self:
        """Distinct rows and their values, in place of older ones."""
        order = np.argsort(rows, kind="stable")
        rows, fresh = rows[order], np.fromiter(values, dtype=object, count=len(values))[order]
        at, known = self.places(rows)
        held = self.values.copy()
        held[at[known]] = fresh[known]
        new = ~known
        return type(self)(np.insert(self.rows, at[new], rows[new]), np.insert(held, at[new], fresh[new]))

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows int64 [n]: their places int64 [n] here, and whether they are here, bool [n]."""
        return _places(self.rows, rows)

    def of(self, rows: np.ndarray) -> list[Any] | None:
        """Values of rows int64 [n], None where the bundle's stands; None in place of the list where all do."""
        at, hit = self.places(rows)
        if not hit.any():
            return None
        found = np.full(len(rows), None, dtype=object)
        found[hit] = self.values[at[hit]]
        return [*found]


def _places(known: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows int64 [n]: their places int64 [n] in `known`, which ascends, and whether they are there, bool [n]."""
    at = np.searchsorted(known, rows)
    there = at < len(known)
    there[there] = known[at[there]] == rows[there]
    return at, there


def explicit(value: Any, feature: FeatureSpec) -> Any:
    """A raw value that encodes as this one and is never None, which would mean that the catalogue's stands."""
    if not is_missing(value):
        return value
    return [] if feature.is_jagged else "nan" if feature.kind == "numeric" else ""


class GrownEncoded(Encoded):
    """A column of total + 1 rows over one of n + 1, the last of both what an unknown thing reads.

    rows int64 [k], ascending: those that read `fresh` [k]; others behind the n read as unknown. `values` and `offsets`
    are made when somebody asks for all of them.
    """

    def __init__(self, base: Encoded, rows: np.ndarray, fresh: Encoded, total: int) -> None:
        self.base, self.rows, self.fresh, self.total = base, rows, fresh, total

    def __len__(self) -> int:
        return self.total + 1

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        unknown = len(self.base) - 1
        at, hit = _places(self.rows, rows)
        before = np.where((rows < 0) | (rows > unknown), unknown, rows)
        if not hit.any():
            return self.base.take(before)
        old, new = taken(self.base, before[~hit]), taken(self.fresh, at[hit])
        order = np.empty(len(rows), dtype=np.int64)
        order[~hit], order[hit] = np.arange(len(old)), len(old) + np.arange(len(new))
        return _behind(old, new).take(order)

    def with_more(self, rows: np.ndarray, fresh: Encoded, total: int) -> Self:
        """Rows int64 [m], distinct, read `fresh` [m]."""
        left = np.flatnonzero(~np.isin(self.rows, rows))
        every = np.concatenate([self.rows[left], rows])
        order = np.argsort(every, kind="stable")
        return type(self)(self.base, every[order], taken(_behind(taken(self.fresh, left), fresh), order), total)

    @cached_property
    def _whole(self) -> Encoded:
        return taken(self, np.append(np.arange(self.total), -1))

    @property
    def values(self) -> np.ndarray:
        return self._whole.values

    @property
    def offsets(self) -> np.ndarray | None:
        return self._whole.offsets


def grown_encoded(column: Encoded, rows: np.ndarray, fresh: Encoded, total: int) -> Encoded:
    """column: of n + 1 rows, the last what an unknown thing reads; rows int64 [m], distinct, get `fresh` [m].

    -> total + 1 rows: new ones without a value read as unknown.
    """
    if not isinstance(column, GrownEncoded):
        column = GrownEncoded(column, np.empty(0, np.int64), taken(column, np.empty(0, np.int64)), len(column) - 1)
    grown = column.with_more(rows, fresh, total)
    if len(grown.rows) > most_beside(len(column.base)):
        return Encoded(grown.values, grown.offsets)
    return grown


def _behind(first: Encoded, second: Encoded) -> Encoded:
    """The second column's rows behind the first's, as values of its type."""
    values = np.concatenate([first.values, second.values.astype(first.values.dtype, copy=False)])
    if first.offsets is None or second.offsets is None:
        return Encoded(values)
    return Encoded(values, np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]))


def unknown_column(feature: FeatureSpec, neutral: int | float, rows: int) -> Encoded:
    """A column of `rows` + 1 rows that knows nothing."""
    if feature.is_jagged:
        return Encoded(np.empty(0, np.int64), np.zeros(rows + 2, np.int64))
    return Encoded(np.full(rows + 1, neutral, np.float32 if feature.is_dense else np.int64))
