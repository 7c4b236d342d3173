"""Tables of a byte a number: each row with a scale and an offset of its own.

A row of `dim` numbers takes `dim + 8` bytes in place of `4 * dim`: codes 0..255, then scale and offset as float32, the
layout of fbgemm's fused 8-bit rowwise kernels. A number is off by at most half a scale, which is a 510th of what the
row's numbers span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.tables import FrozenTables

Kind = Literal["float32", "int8"]

_BESIDE = 8
"""Bytes of scale and offset."""


def quantised(rows: Tensor) -> Tensor:
    """float32 [n, dim] -> uint8 [n, `row_bytes(dim)`]. The numbers must be finite."""
    dim = rows.shape[1]
    if padding := row_bytes(dim) - _BESIDE - dim:
        rows = F.pad(rows.unsqueeze(0), (0, padding), mode="replicate").squeeze(0)  # the span stays as it is
    packed: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(rows.contiguous())
    return packed


def row_bytes(dim: int) -> int:
    """Of a row of `dim` numbers. Scales lie at multiples of four: a reader meets no half-written one."""
    return -(-dim // 4) * 4 + _BESIDE


def dims(embedding: object) -> Mapping[str, int]:
    """table -> numbers a row, where that is not its tensor's width."""
    return embedding.dims if isinstance(embedding, QuantisedTables) else {}


class QuantisedTables(FrozenTables):
    """`FrozenTables` over uint8 tables as `quantised` makes them; vectors come out as float32.

    A row beyond a table is an IndexError: it is compared with the table's length before any memory is read.
    """

    @classmethod
    def like(cls, tables: FrozenTables) -> Self:
        """The same tables, quantised, on the meta device: their memory is still to be assigned."""
        named = {p.table.name: p.table for p in tables.placements.values()}
        weights = {
            name: torch.empty(table.rows, row_bytes(table.dim), dtype=torch.uint8, device="meta")
            for name, table in named.items()
        }
        made = cls(tables.placements, weights)
        made.placer = tables.placer
        return made

    @property
    def dims(self) -> dict[str, int]:
        """table -> numbers a row."""
        return {p.table.name: p.table.dim for p in self.placements.values()}

    def look_up(self, prints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        vectors = {}
        for feature, rows in self.placer(prints).items():
            table = self.placements[feature].table
            vectors[feature] = read(self.weights[table.name], rows, table.dim).reshape(-1, self.widths[feature])
        return vectors


def read(table: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Rows int64 [n] of a table uint8 [rows, `row_bytes(dim)`] -> float32 [n, dim], as bags of one row each: torch's
    op for these has the quickest of the kernels tried, and checks each row's number."""
    each = torch.arange(len(rows))
    try:
        found: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            table, rows, each, False, 0, False, None, None, False
        )
    except RuntimeError as error:
        raise IndexError(
            f"a row that the table of {len(table):,} does not have: {str(error).splitlines()[0]}"
        ) from None
    return found if found.shape[1] == dim else found[:, :dim]
