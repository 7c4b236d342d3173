"""The raw table of a catalogue that grows: what differs lies beside it until somebody asks for all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.data.encoding import ArrowColumn, arrow_column, is_missing, one_array, without_nan
from engine.grown_columns import Overlay, most_beside
from engine.hashing import canonical
from engine.schema import FeatureSpec

_CHUNKS = 64
"""Pieces of a raw column that may lie behind one another before they are joined."""


class GrownTable:
    """A table of Arrow columns, with raw values of some rows replaced and more rows behind the last.

    beside: column -> the rows that differ and their values, None where one was removed; features: column -> the feature
    that it feeds, for those that feed one.
    """

    def __init__(
        self,
        base: pa.Table,
        beside: Mapping[str, Overlay],
        features: Mapping[str, FeatureSpec],
        total: int,
    ) -> None:
        self.base, self.beside, self.features, self.total = base, beside, features, total

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        return cls(table, {}, {}, table.num_rows)

    @property
    def names(self) -> list[str]:
        names: list[str] = self.base.column_names
        return names

    @cached_property
    def whole(self) -> pa.Table:
        """All of it; columns are of a type that holds old and new values, null where there is none."""
        if not self.beside and self.total == self.base.num_rows:
            return self.base
        return pa.table({name: self.column(name) for name in self.names})

    def column(self, name: str) -> pa.ChunkedArray:
        """As of `whole`."""
        column, overlay = self.base.column(name), self.beside.get(name, Overlay.nothing())
        if not len(overlay.rows) and self.total == len(column):
            return column
        return _grown(column, overlay.rows, [*overlay.values], self.features.get(name), self.total)

    def values(self, name: str, rows: np.ndarray) -> list[Any]:
        """Raw values of rows int64 [n], without the rest of the column."""
        column, overlay = self.base.column(name), self.beside.get(name, Overlay.nothing())
        there = np.where(rows < len(column), rows, -1)
        found = column.take(pa.array(there, mask=there < 0)).to_pylist()
        at, hit = overlay.places(rows)
        if hit.any():
            told = _raw([*overlay.values[at[hit]]], self.features.get(name), _plain(column.type)).to_pylist()
            for place, value in zip(np.flatnonzero(hit).tolist(), told, strict=True):
                found[place] = value
        return found

    def with_more(
        self, told: Mapping[str, tuple[np.ndarray, Sequence[Any]]], features: Mapping[str, FeatureSpec], total: int
    ) -> Self:
        """told: column -> distinct rows int64 [m] below `total`, and their values."""
        beside = dict(self.beside)
        for name, (rows, values) in told.items():
            if len(rows):
                beside[name] = beside.get(name, Overlay.nothing()).with_more(rows, values)
        grown = type(self)(self.base, beside, features, total)
        if max((len(o.rows) for o in beside.values()), default=0) <= most_beside(self.base.num_rows):
            return grown
        return type(self)(grown.whole, {}, features, total)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _grown(
    column: pa.ChunkedArray, rows: np.ndarray, values: Sequence[Any], feature: FeatureSpec | None, total: int
) -> pa.ChunkedArray:
    """A column with these rows' values, distinct rows, in place of what was there or behind it."""
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
