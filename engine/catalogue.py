"""The items of a bundle in Arrow, memory-mapped, with their features already encoded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.appended import appended
from engine.components import Catalogue
from engine.data.encoding import Encoded, one_array
from engine.errors import BundleError, SchemaError
from engine.grown_columns import Overlay, explicit, grown_encoded, most_beside, unknown_column
from engine.grown_table import GrownTable
from engine.hashing import canonical, fingerprint_column, fingerprints
from engine.resident import resident

if TYPE_CHECKING:
    from engine.data.encoder import FeatureEncoder
    from engine.schema import Schema

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
        self._table = GrownTable.of(table)
        self.key = key
        self.title_column = title
        self.encoded = dict(encoded or {})
        self.columns = dict(columns or {})
        self.changed: dict[str, Overlay] = {}
        self._ids = one_array(table.column(key))
        self._new_ids = np.empty(0, object)  # behind those
        self.prints = fingerprint_column(self._ids)
        self._places = _sorted(self.prints, 0)
        self._new_places = _sorted(self.prints[:0], 0)
        known = self._places[0]
        if len(known) and (known[1:] == known[:-1]).any():
            twice = self._ids[int(self._places[1][int(np.argmax(known[1:] == known[:-1]))])].as_py()
            raise SchemaError(f"id '{twice}' stands in more than one row of the catalogue")

    def __len__(self) -> int:
        return len(self.prints)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [n], -1 where unknown."""
        return self.rows_of(fingerprints(ids))

    def rows_of(self, prints: np.ndarray) -> np.ndarray:
        """Rows of fingerprints int64 [n] -> int64 [n], -1 where unknown."""
        rows = _found(self._places, prints)
        return np.maximum(rows, _found(self._new_places, prints)) if len(self._new_places[0]) else rows

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids as text; an unknown row (-1) is an IndexError."""
        rows = np.asarray(rows, dtype=np.int64)
        new = rows >= len(self._ids)
        if not new.any():
            return self._ids.take(pa.array(rows)).to_pylist()
        found = np.empty(len(rows), object)
        found[new] = self._new_ids[rows[new] - len(self._ids)]
        found[~new] = self._ids.take(pa.array(rows[~new])).to_pylist()
        return [*found]

    @property
    def table(self) -> pa.Table:
        """All of it; of a catalogue that has just grown it is made now."""
        return self._table.whole

    @property
    def attributes(self) -> list[str]:
        """The table's columns."""
        return self._table.names

    def raw(self, name: str, rows: np.ndarray) -> list[Any]:
        """What the table's column says of rows int64 [n]."""
        return self._table.values(name, rows)

    def column(self, name: str) -> pa.Array:
        """An attribute, or the raw values of a feature, by row."""
        source = name if name in self.attributes else self.columns.get(name, name)
        if source not in self.attributes:
            raise SchemaError(f"the catalogue has no column '{name}'; it has {', '.join(self.attributes)}")
        return one_array(self._table.column(source))

    def title(self, row: int) -> str:
        """What people read: the title column's text, else the id."""
        if self.title_column and self.title_column in self.attributes:
            (text,) = self.raw(self.title_column, np.array([row]))
            if text is not None and str(text):
                return str(text)
        return self.ids(np.array([row]))[0]

    # ----------------------------------------------------------------------------------------------- growth
    def updated(self, ids: Sequence[str], features: Sequence[Mapping[str, Any]], encoder: FeatureEncoder) -> Self:
        """A catalogue in which these items read otherwise, or are new; this one stays as it is.

        features: for each id, the raw values that are replaced, by feature or by the column that feeds it; None removes
        one, and names that the catalogue does not know are left out. Of several for one id the last counts. Rows keep
        their numbers; new ids stand behind them in the order given. SchemaError where a value cannot be read. It takes
        the time of what changes, and now and then that of a column, into which the newest changes are written.
        """
        merged: dict[str, dict[str, Any]] = {}
        for item, its in zip(ids, features, strict=True):
            merged.setdefault(canonical(item), {}).update(its)
        prints = fingerprints(merged)
        rows = self.rows_of(prints)
        new = np.flatnonzero(rows < 0)
        rows[new] = np.arange(len(self), len(self) + len(new))
        total = len(self) + len(new)
        given = _Given(rows, [*merged.values()], total)
        grown = copy.copy(self)
        grown.encoded, grown.changed = self._encoded_with(given, prints, encoder)
        grown._table = self._table_with(given, [*merged], encoder.schema)
        if len(new):
            grown._index(
                prints[new], [item for item, row in zip(merged, rows.tolist(), strict=True) if row >= len(self)]
            )
        return grown

    def changed_values(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """feature -> raw values of rows int64 [n], None where the bundle's own stands; only features that differ.

        What was removed is there as a value that reads as missing.
        """
        found = {name: overlay.of(rows) for name, overlay in self.changed.items()}
        return {name: values for name, values in found.items() if values is not None}

    def _encoded_with(
        self, given: _Given, prints: np.ndarray, encoder: FeatureEncoder
    ) -> tuple[dict[str, Encoded], dict[str, Overlay]]:
        encoded, changed = dict(self.encoded), dict(self.changed)
        for feature in encoder.schema.of_item():
            known = encoded.get(feature.name)
            rows, values = given.of(feature.name, self.columns.get(feature.name, feature.column))
            if feature.kind == "categorical" and feature.column == encoder.schema.item:
                if known is not None:
                    encoded[feature.name] = grown_encoded(known, given.rows, Encoded(prints), given.total)
            elif len(rows) or (known is not None and given.total > len(self)):
                known = known or unknown_column(feature, encoder.neutral(feature), len(self))
                fresh = encoder.encode_values(feature.name, values)
                encoded[feature.name] = grown_encoded(known, rows, fresh, given.total)
                if len(rows):
                    overlay = changed.get(feature.name, Overlay.nothing())
                    changed[feature.name] = overlay.with_more(rows, [explicit(v, feature) for v in values])
        return encoded, changed

    def _table_with(self, given: _Given, ids: list[str], schema: Schema) -> GrownTable:
        features = {self.columns.get(f.name, f.column): f for f in schema.of_item()}
        features.pop(self.key, None)
        told = {n: given.of(*((features[n].name,) if n in features else ()), n) for n in self.attributes}
        new = np.flatnonzero(given.rows >= len(self))
        told[self.key] = given.rows[new], [ids[n] for n in new]
        return self._table.with_more(told, features, given.total)

    def _index(self, prints: np.ndarray, ids: list[str]) -> None:
        """More rows behind the last, findable by their ids."""
        self.prints = appended(self.prints, prints)
        self._new_ids = appended(self._new_ids, np.array(ids, object))
        first = len(self.prints) - len(prints) - len(self._new_places[0])
        self._new_places = _sorted(self.prints[first:], first)
        if len(self.prints) - first > most_beside(first):
            (old, rows), (new, new_rows) = self._places, self._new_places
            at = np.searchsorted(old, new)
            self._places = np.insert(old, at, new), np.insert(rows, at, new_rows)
            self._new_places = _sorted(prints[:0], 0)

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


class _Given:
    """What a batch of items says: rows int64 [m] of the catalogue that has `total`, and a mapping each."""

    def __init__(self, rows: np.ndarray, values: Sequence[Mapping[str, Any]], total: int) -> None:
        self.rows, self.values, self.total = rows, values, total

    def of(self, *names: str) -> tuple[np.ndarray, list[Any]]:
        """Rows int64 [k] that say something under one of these names, and what: the first name counts."""
        found = [(n, next((its[name] for name in names if name in its), _SILENT)) for n, its in enumerate(self.values)]
        said = [(n, value) for n, value in found if value is not _SILENT]
        return self.rows[np.array([n for n, _ in said], dtype=np.int64)], [value for _, value in said]


_SILENT = object()


def _sorted(prints: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints int64 [n] of the rows from `first` on -> ascending, with their rows."""
    order = np.argsort(prints, kind="stable")
    return prints[order], first + order


def _found(places: tuple[np.ndarray, np.ndarray], prints: np.ndarray) -> np.ndarray:
    """Rows of fingerprints int64 [n], -1 where they are not among these."""
    known, rows = places
    if not len(known):
        return np.full(len(prints), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(known, prints), len(known) - 1)
    return np.where(known[at] == prints, rows[at], -1)


def text_ids(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids as the canonical text that their fingerprints come from."""
    column = one_array(column)
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.string())
    return pa.array([None if v is None else canonical(v) for v in column.to_pylist()], pa.string())
