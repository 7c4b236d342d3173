"""Raw columns to ids and numbers: the one path that training, streaming and serving share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import SchemaError
from engine.hashing import canonical, fingerprint, fingerprint_column
from engine.schema import FeatureSpec

MISSING = fingerprint("")
"""The fingerprint of a missing id: null offline and a feature left out of a request are the same."""

ArrowColumn: TypeAlias = pa.Array | pa.ChunkedArray


@dataclass(frozen=True)
class Encoded:
    """A column after encoding.

    values: int64 fingerprints, or float32 numbers. offsets: int64 [n + 1] where a row has any number of values.
    """

    values: np.ndarray
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Values of these rows behind one another, with the lengths int64 [n] if jagged. Row -1 is the last row."""
        if self.offsets is None:
            return self.values[rows], None
        rows = np.where(rows < 0, len(self) - 1, rows)
        start = self.offsets[rows]
        lengths = self.offsets[rows + 1] - start
        return self.values[ranges(start, lengths)], lengths

    def with_neutral(self, value: int | float) -> Self:
        """One more row at the end, what an unknown row reads: `value`, or no value if jagged."""
        if self.offsets is None:
            return type(self)(np.append(self.values, np.array(value, dtype=self.values.dtype)))
        return type(self)(self.values, np.append(self.offsets, self.offsets[-1]))


def taken(column: Encoded, rows: np.ndarray) -> Encoded:
    """A column of these rows of another; row -1 is the last."""
    values, lengths = column.take(rows)
    if lengths is None:
        return Encoded(values)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    lengths.cumsum(out=offsets[1:])
    return Encoded(values, offsets)


def ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start[i], start[i] + 1, ... for lengths[i] values each, behind one another: int64 [sum(lengths)]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(start - (ends - lengths), lengths)


def one_array(column: ArrowColumn) -> pa.Array:
    """A column in one piece; it is copied only where it lies in several."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def without_nan(column: ArrowColumn) -> ArrowColumn:
    """NaN is a missing id, not an id named nan."""
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def encode_ids(column: ArrowColumn) -> np.ndarray:
    """One id a row -> int64 [n] fingerprints."""
    return fingerprint_column(without_nan(column))


def encode_numbers(column: ArrowColumn, name: str) -> np.ndarray:
    """Numbers -> float32 [n], NaN where missing or infinite. SchemaError if it holds something else."""
    column = one_array(column)
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.timestamp("s")).cast(pa.int64())
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"feature '{name}' is numeric but its column holds something else: {error}") from error
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return np.where(np.isfinite(narrow), narrow, np.float32(np.nan))


def encode_lists(column: ArrowColumn, feature: FeatureSpec) -> Encoded:
    """Several ids a row, from lists or from text split at the feature's separator, the first `max_length` kept.

    Blank text and nulls between separators are no values.
    """
    column = one_array(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return Encoded(np.empty(0, np.int64), np.zeros(len(column) + 1, np.int64))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        text = column if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else _texts(column)
        column = pc.split_pattern(text, feature.separator)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = without_nan(pc.list_flatten(column))
    if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
        flat = pc.utf8_trim_whitespace(flat)
        keep = pc.fill_null(pc.not_equal(flat, ""), False).to_numpy(zero_copy_only=False)
    else:
        keep = pc.is_valid(flat).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)[keep]
    first = np.searchsorted(row, row, side="left")
    kept = np.arange(len(row)) - first < feature.max_length
    prints = fingerprint_column(flat)[keep][kept]
    counts = np.bincount(row[kept], minlength=len(lengths))
    return Encoded(prints, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _texts(column: pa.Array) -> pa.Array:
    return pa.array([None if is_missing(v) else canonical(v) for v in column.to_pylist()], pa.string())


def encode_raw(column: ArrowColumn, feature: FeatureSpec) -> Encoded:
    """A column before its numeric transform: ids, jagged ids, or float32 numbers."""
    if feature.kind == "numeric":
        return Encoded(encode_numbers(column, feature.name))
    if feature.is_jagged:
        return encode_lists(column, feature)
    return Encoded(encode_ids(column))


def arrow_column(values: Sequence[Any], feature: FeatureSpec) -> pa.Array:
    """A request's raw values as the Arrow column that `encode_raw` reads. SchemaError names the feature."""
    if feature.kind == "numeric":
        return pa.array([_number(v, feature.name) for v in values], pa.float64())
    if feature.is_jagged:
        return pa.array([_list(v, feature) for v in values], pa.list_(pa.string()))
    return pa.array([None if is_missing(v) else canonical(v) for v in values], pa.string())


def is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float | np.floating) and value != value)


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"feature '{name}' is numeric, got {value!r}") from error


def _list(value: Any, feature: FeatureSpec) -> list[str]:
    if is_missing(value):
        return []
    if isinstance(value, list | tuple | np.ndarray):
        return [canonical(v) for v in value if not is_missing(v)]
    return canonical(value).split(feature.separator)
