"""The items of a bundle in Arrow, memory-mapped, with their features already encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.components import Catalogue
from engine.data.encoding import Encoded, one_array
from engine.errors import BundleError, SchemaError
from engine.hashing import canonical, fingerprint_column, fingerprints
from engine.resident import resident

TABLE = "items.arrow"
ENCODED = "encoded.safetensors"


class ArrowCatalogue(Catalogue):
    """Rows of things that have an id: a bundle's items, and while preparing data also the users.

    table: Arrow columns, one of them `key`, with the ids as text, distinct.
    encoded: feature -> encoded column of len(table) + 1 rows; the last row is what an unknown thing reads, so that
        row -1 needs no special case.
    """

    def __init__(
        self,
        table: pa.Table,
        key: str,
        encoded: Mapping[str, Encoded] | None = None,
        *,
        title: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """columns: feature -> the table's column that feeds it, where the names differ."""
        self.table = table
        self.key = key
        self.title_column = title
        self.encoded = dict(encoded or {})
        self.columns = dict(columns or {})
        self._ids = one_array(table.column(key))
        self.prints = fingerprint_column(self._ids)
        self._order = np.argsort(self.prints, kind="stable")
        self._sorted = self.prints[self._order]
        if len(self._sorted) and (self._sorted[1:] == self._sorted[:-1]).any():
            twice = self._ids[int(self._order[int(np.argmax(self._sorted[1:] == self._sorted[:-1]))])].as_py()
            raise SchemaError(f"id '{twice}' stands in more than one row of the catalogue")

    def __len__(self) -> int:
        return len(self.prints)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [n], -1 where unknown."""
        return self.rows_of(fingerprints(ids))

    def rows_of(self, prints: np.ndarray) -> np.ndarray:
        """Rows of fingerprints int64 [n] -> int64 [n], -1 where unknown."""
        if not len(self):
            return np.full(len(prints), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._sorted, prints), len(self) - 1)
        return np.where(self._sorted[at] == prints, self._order[at], -1)

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids as text; an unknown row (-1) is an IndexError."""
        return self._ids.take(pa.array(np.asarray(rows, dtype=np.int64))).to_pylist()

    def column(self, name: str) -> pa.Array:
        """An attribute, or the raw values of a feature, by row."""
        source = name if name in self.table.column_names else self.columns.get(name, name)
        if source not in self.table.column_names:
            raise SchemaError(f"the catalogue has no column '{name}'; it has {', '.join(self.table.column_names)}")
        return one_array(self.table.column(source))

    def title(self, row: int) -> str:
        """What people read: the title column's text, else the id."""
        if self.title_column and self.title_column in self.table.column_names:
            text = self.table.column(self.title_column)[row].as_py()
            if text is not None and str(text):
                return str(text)
        return str(self._ids[row].as_py())

    def save(self, folder: Path) -> None:
        """Writes `items.arrow` and `encoded.safetensors` into an existing folder."""
        meta = {b"key": self.key.encode(), b"title": (self.title_column or "").encode()}
        meta |= {f"column:{name}".encode(): column.encode() for name, column in self.columns.items()}
        table = self.table.combine_chunks().replace_schema_metadata(meta)
        with pa.OSFile(str(folder / TABLE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        tensors = {}
        for name, column in self.encoded.items():
            tensors[f"{name}:values"] = torch.from_numpy(np.array(column.values))
            if column.offsets is not None:
                tensors[f"{name}:offsets"] = torch.from_numpy(np.array(column.offsets))
        save_file(tensors, folder / ENCODED)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads what `save` wrote, or maps it where it is large; BundleError if it is not whole."""
        try:
            path = folder / TABLE
            source = pa.BufferReader(path.read_bytes()) if resident(path) else pa.memory_map(str(path), "r")
            table = pa.ipc.open_file(source).read_all()
            read = resident(folder / ENCODED)
            with safe_open(folder / ENCODED, framework="pt") as file:
                mapped = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            tensors = {name: values.copy() for name, values in mapped.items()} if read else mapped
        except Exception as error:  # safetensors and Arrow raise their own kinds
            raise BundleError(f"{folder}: the catalogue cannot be read: {error}") from error
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        encoded = {
            name.removesuffix(":values"): Encoded(values, tensors.get(name.replace(":values", ":offsets")))
            for name, values in tensors.items()
            if name.endswith(":values")
        }
        columns = {k.removeprefix("column:"): v for k, v in meta.items() if k.startswith("column:")}
        return cls(table, meta["key"], encoded, title=meta.get("title") or None, columns=columns)


def text_ids(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids as the canonical text that their fingerprints come from."""
    column = one_array(column)
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.string())
    return pa.array([None if v is None else canonical(v) for v in column.to_pylist()], pa.string())
