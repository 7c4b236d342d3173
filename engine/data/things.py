"""Items and users: their attributes, joined with what only the log knows, encoded once each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.catalogue import ArrowCatalogue, text_ids
from engine.data.encoding import Encoded, encode_raw
from engine.data.ingest import IdIndex
from engine.data.plan import Plan
from engine.data.readers import Table
from engine.data.store import Store, chunks


def build_things(plan: Plan, store: Store, index: IdIndex | None, side: str) -> ArrowCatalogue:
    """The catalogue of one side (`item` or `user`), not yet encoded.

    Rows: those of the attributes first, then ids that only the log holds. A feature that the log carries by row is
    here with its newest value, for serving.
    """
    data = plan.config.data
    attributes, key = (plan.items, data.item) if side == "item" else (plan.users, data.user)
    if index is None or key is None:
        return ArrowCatalogue(pa.table({"id": pa.array([], pa.string())}), "id")
    table = attributes.read() if attributes else pa.table({key: pa.array([], pa.string())})
    table = table.set_column(table.column_names.index(key), key, text_ids(table.column(key)))
    unseen = index.ids()[table.num_rows :]
    table = pa.concat_tables(
        [table, pa.table({key: pa.array(unseen, pa.string())})], promote_options="default"
    ).combine_chunks()
    features = [f for f in plan.schema.features if f.side == side and f.kind != "sequence"]
    from_rows = list(dict.fromkeys(f.column for f in features if plan.place(f) == "row"))
    wanted = [c for c in from_rows if c not in table.column_names]
    if wanted:
        newest = _newest_rows(store, side, len(index.rows))
        for name, column in zip(wanted, _take(plan.interactions, newest, wanted), strict=True):
            table = table.append_column(name, column)
    columns = {f.name: f.column for f in features if f.name != f.column}
    return ArrowCatalogue(table, key, title=data.title if side == "item" else None, columns=columns)


def raw_features(plan: Plan, things: ArrowCatalogue, side: str) -> dict[str, Encoded]:
    """feature -> its column before the numeric transform, for those that the catalogue can feed."""
    return {
        f.name: encode_raw(things.table.column(f.column), f)
        for f in plan.schema.features
        if f.side == side and f.kind != "sequence" and f.column in things.table.column_names
    }


def _newest_rows(store: Store, side: str, count: int) -> np.ndarray:
    """int64 [count]: the row with the newest event of each, -1 where there is none."""
    newest = np.full(count + 1, -1, dtype=np.int64)
    owner, order = store[side], store["order"]
    for part in chunks(len(order)):
        rows = order[part]
        newest[owner[rows]] = rows  # oldest first, so the newest stays
    return newest[:-1]


def _take(table: Table, rows: np.ndarray, columns: list[str]) -> list[pa.ChunkedArray]:
    """These rows of a table too large to hold; null for row -1."""
    wanted = np.unique(rows[rows >= 0])
    parts, start = [], 0
    for batch in table.batches(columns):
        first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
        if last > first:
            parts.append(batch.take(pa.array(wanted[first:last] - start)))
        start += batch.num_rows
    found = pa.Table.from_batches(parts) if parts else table.schema().empty_table().select(columns)
    place = pa.array(np.searchsorted(wanted, rows), mask=rows < 0)
    return [found.column(name).take(place) for name in columns]
