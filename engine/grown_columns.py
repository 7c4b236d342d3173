"""Columns of a catalogue with some rows replaced and more behind them; what was there is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.encoding import ArrowColumn, Encoded, arrow_column, is_missing, one_array, without_nan
from engine.hashing import canonical
from engine.schema import FeatureSpec

_CHUNKS = 64
"""Pieces of a raw column that may lie behind one another before they are joined."""


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
        every = np.fromiter(values, dtype=object, count=len(values))
        left = ~np.isin(self.rows, rows)
        rows, every = np.concatenate([self.rows[left], rows]), np.concatenate([self.values[left], every])
        order = np.argsort(rows, kind="stable")
        return type(self)(rows[order], every[order])

    def of(self, rows: np.ndarray) -> list[Any] | None:
        """Values of rows int64 [n], None where the bundle's stands; None in place of the list where all do."""
        if not len(self.rows):
            return None
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        hit = self.rows[at] == rows
        if not hit.any():
            return None
        found = self.values[at]
        found[~hit] = None
        return [*found]


def explicit(value: Any, feature: FeatureSpec) -> Any:
    """A raw value that encodes as this one and is never None, which would mean that the catalogue's stands."""
    if not is_missing(value):
        return value
    return [] if feature.is_jagged else "nan" if feature.kind == "numeric" else ""


def grown_encoded(column: Encoded, rows: np.ndarray, fresh: Encoded, total: int) -> Encoded:
    """column: of n + 1 rows, the last what an unknown thing reads; rows int64 [m], distinct, get `fresh` [m].

    -> total + 1 rows: new ones without a value read as unknown.
    """
    known = len(column) - 1
    source = np.full(total + 1, known, dtype=np.int64)
    source[:known] = np.arange(known)
    source[rows] = known + 1 + np.arange(len(rows))
    values = np.concatenate([column.values, fresh.values.astype(column.values.dtype, copy=False)])
    if column.offsets is None or fresh.offsets is None:
        return Encoded(values[source])
    both = Encoded(values, np.concatenate([column.offsets, fresh.offsets[1:] + column.offsets[-1]]))
    taken, lengths = both.take(source)
    assert lengths is not None
    return Encoded(taken, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def unknown_column(feature: FeatureSpec, neutral: int | float, rows: int) -> Encoded:
    """A column of `rows` + 1 rows that knows nothing."""
    if feature.is_jagged:
        return Encoded(np.empty(0, np.int64), np.zeros(rows + 2, np.int64))
    return Encoded(np.full(rows + 1, neutral, np.float32 if feature.is_dense else np.int64))


def grown_raw(
    column: pa.ChunkedArray, rows: np.ndarray, values: Sequence[Any], feature: FeatureSpec | None, total: int
) -> pa.ChunkedArray:
    """As `grown_encoded`, for raw values: of a type that holds old and new, null where there is none."""
    known = len(column)
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([one_array(column).dictionary_decode()])
    fresh = _raw(values, feature, column.type)
    if fresh.type != column.type:
        column = pa.chunked_array([_wider(column, fresh.type)])
    old = rows < known
    if old.any():
        source = np.arange(known)
        source[rows[old]] = known + np.flatnonzero(old)
        both = pa.chunked_array([*column.chunks, fresh], column.type)
        column = pa.chunked_array([one_array(both.take(pa.array(source)))], column.type)
    if total > known:
        behind = np.full(total - known, -1, dtype=np.int64)
        behind[rows[~old] - known] = np.flatnonzero(~old)
        column = pa.chunked_array([*column.chunks, fresh.take(pa.array(behind, mask=behind < 0))], column.type)
    return column if column.num_chunks <= _CHUNKS else pa.chunked_array([one_array(column)], column.type)


def _raw(values: Sequence[Any], feature: FeatureSpec | None, wanted: pa.DataType) -> pa.Array:
    """As the column's type where it can hold them, else as numbers, lists or text."""
    if feature is not None and feature.kind == "numeric":
        array = without_nan(arrow_column(values, feature))
    elif feature is not None and feature.is_jagged:
        array = arrow_column(values, feature)
        if pa.types.is_string(wanted) or pa.types.is_large_string(wanted):
            text = pc.binary_join(array, feature.separator)
            array = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    else:
        array = pa.array([None if is_missing(v) else _text(v) for v in values], pa.string())
    try:
        return array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return array


def _text(value: Any) -> str:
    return "|".join(map(canonical, value)) if isinstance(value, list | tuple) else canonical(value)


def _wider(column: ArrowColumn, wanted: pa.DataType) -> pa.Array:
    column = one_array(column)
    try:
        if not pa.types.is_string(wanted) or pa.types.is_nested(column.type):
            return column.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    return pa.array([None if v is None else _text(v) for v in column.to_pylist()], pa.string()).cast(wanted)
