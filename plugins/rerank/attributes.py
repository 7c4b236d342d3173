"""An attribute of the catalogue as integers: which values has each item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.components import Catalogue
from engine.errors import PlexrankError, PluginError


@dataclass(frozen=True)
class Attribute:
    """Values of one attribute: item `row` has `codes[offsets[row]:offsets[row + 1]]`, numbers below `distinct`.

    offsets int64 [items + 1], codes int64 [values].
    """

    offsets: np.ndarray
    codes: np.ndarray
    distinct: int

    def of(self, row: int) -> np.ndarray:
        """Codes of one item -> int64; an unknown item (-1) has none."""
        return self.codes[self.offsets[row] : self.offsets[row + 1]] if row >= 0 else self.codes[:0]

    def one_hot(self, rows: np.ndarray) -> np.ndarray:
        """rows int64 [n] (-1: unknown, all zeros) -> float32 [n, distinct], 1 where an item has the value."""
        hot = np.zeros((len(rows), self.distinct), dtype=np.float32)
        known = np.flatnonzero(rows >= 0)
        starts, ends = self.offsets[rows[known]], self.offsets[rows[known] + 1]
        lengths = ends - starts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        hot[np.repeat(known, lengths), self.codes[np.repeat(starts, lengths) + within]] = 1.0
        return hot


def read_attribute(catalogue: Catalogue, name: str, separator: str) -> Attribute:
    """Reads a column once. Lists and separated strings have several values; a null and an empty text have none.

    Raises PluginError if the catalogue has no such attribute.
    """
    try:
        column = catalogue.column(name)
    except (KeyError, PlexrankError) as error:
        raise PluginError(f"the catalogue has no attribute '{name}' for a reranker: {error}") from error
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        text = column.cast(pa.string())
        column = pc.split_pattern(pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text), separator)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = pc.dictionary_encode(pc.list_flatten(column))
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), len(encoded.dictionary))
    distinct = len(encoded.dictionary) + int(encoded.null_count > 0)
    return Attribute(offsets, codes.to_numpy(zero_copy_only=False).astype(np.int64), distinct)
