"""Many events in one record: an Arrow IPC stream, a column an attribute, found by name.

A batch with a column `request_id` is of rankings, any other of interactions. Columns may stand in any order, and more
may be there; a column of `REQUIRED` that is missing, or one whose type differs, makes the batch unreadable: nothing is
filled with nulls. Feature values are JSON text, as their types differ from row to row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import pyarrow as pa

from engine.components import LogRecord
from engine.errors import EventError
from engine.events import Event, EventRefused, InteractionData, RankingData, Reason, check_version
from engine.hashing import canonical
from engine.streaming.events.arrow_size import inflated_size
from engine.streaming.events.binary_mode import content_type

Kind = Literal["interaction", "ranking"]

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
MOST_BYTES = 900_000
"""Of a record: brokers take 1 MiB, and keys, headers and framing need room."""
MOST_INFLATED = 64 << 20
"""Bytes that a record may become once its buffers are decompressed."""
MOST_ROWS = 200_000
_MAGIC = b"\xff\xff\xff\xff"  # an encapsulated message begins so; no UTF-8 does

_TIME = pa.timestamp("us", tz="UTC")
_TEXT = pa.string()
_ENVELOPE = {"id": _TEXT, "source": _TEXT, "time": _TIME}
REQUIRED: dict[Kind, dict[str, pa.DataType]] = {
    "interaction": {**_ENVELOPE, "type": _TEXT, "user": _TEXT, "item": _TEXT, "ranking": _TEXT},
    "ranking": {**_ENVELOPE, "request_id": _TEXT, "user": _TEXT, "items": pa.list_(_TEXT)},
}
OPTIONAL: dict[Kind, dict[str, pa.DataType]] = {
    "interaction": {"value": pa.float64(), "position": pa.int32()},
    "ranking": {
        "score": pa.list_(pa.float64()),
        "position": pa.list_(pa.int32()),
        "propensity": pa.list_(pa.float64()),
        "model": _TEXT,
        "version": _TEXT,
        "arms": _TEXT,
        "user_features": _TEXT,
        "context": _TEXT,
        "history": pa.list_(_TEXT),
        "item_features": _TEXT,
        "shown": pa.int32(),
    },
}
JSON_COLUMNS = ("arms", "user_features", "context", "item_features")


def is_batch(record: LogRecord) -> bool:
    """Whether a record is a batch, by its first bytes or its content type."""
    return record.value.startswith(_MAGIC) or (bool(record.headers) and content_type(record.headers) == MEDIA_TYPE)


def encode_batch(
    kind: Kind,
    columns: Mapping[str, Any] | pa.Table,
    most_bytes: int = MOST_BYTES,
    compression: Literal["zstd", "lz4"] | None = None,
) -> list[bytes]:
    """Columns of events -> records of at most `most_bytes` each, rows in order.

    columns: by name; sequences or Arrow columns, cast to the batch's types. All rows of a record share its key, so put
    those together that belong into one partition. EventError names what is missing, or a row that no record can hold.
    """
    table = _table(kind, columns)
    if table.num_rows == 0:
        return []
    encoded = _stream(table, compression)
    if len(encoded) <= most_bytes:
        return [encoded]
    if table.num_rows == 1:
        raise EventError(f"one {kind} takes {len(encoded):,} bytes as a batch; a record takes {most_bytes:,}")
    parts = min(-(-len(encoded) // most_bytes), table.num_rows)
    step = -(-table.num_rows // max(parts, 2))
    records = []
    for start in range(0, table.num_rows, step):
        records += encode_batch(kind, table.slice(start, step), most_bytes, compression)
    return records


def decode_batch(value: bytes, most_inflated: int = MOST_INFLATED, most_rows: int = MOST_ROWS) -> tuple[Kind, pa.Table]:
    """(kind, its known columns). EventRefused says why it cannot be read."""
    try:
        size, rows = inflated_size(value)
        if size > most_inflated or rows > most_rows:
            raise EventRefused(
                Reason.ARROW,
                f"a batch of {rows:,} rows and {size:,} bytes; at most {most_rows:,} and {most_inflated:,} are read",
            )
        schema = pa.ipc.open_stream(value).schema
        kind: Kind = "ranking" if "request_id" in schema.names else "interaction"
        check_version((schema.metadata or {}).get(b"dataschema", b"").decode("utf-8", "replace"))
        chosen = _known(kind, schema)
        options = pa.ipc.IpcReadOptions(included_fields=sorted(chosen.values()), use_threads=False)
        table = pa.ipc.open_stream(value, options=options).read_all()
        table.validate(full=True)
        return kind, table.combine_chunks()
    except EventRefused:
        raise
    except Exception as error:  # what Arrow raises of damaged bytes is of many classes, MemoryError among them
        raise EventRefused(Reason.ARROW, f"not an Arrow batch that can be read: {error}") from None


def row_of(table: pa.Table, row: int) -> bytes:
    """A batch of one row."""
    return _stream(table.slice(row, 1), None)


def columns_of(events: Sequence[Event]) -> dict[Kind, pa.Table]:
    """Rankings and interactions as columns for `encode_batch`; events of other kinds are left out."""
    found: dict[Kind, pa.Table] = {}
    interactions = [event for event in events if isinstance(event.data, InteractionData)]
    if interactions:
        found["interaction"] = _table("interaction", _interactions(interactions))
    rankings = [event for event in events if isinstance(event.data, RankingData)]
    if rankings:
        found["ranking"] = _table("ranking", _rankings(rankings))
    return found


def _known(kind: Kind, schema: pa.Schema) -> dict[str, int]:
    """name -> place of the columns that are read."""
    chosen = {}
    for name, type_ in (REQUIRED[kind] | OPTIONAL[kind]).items():
        places = schema.get_all_field_indices(name)
        if not places and name not in REQUIRED[kind]:
            continue
        if len(places) != 1:
            raise EventRefused(Reason.ARROW, f"a batch of {kind}s has {len(places)} columns '{name}'; it needs one")
        if schema.field(places[0]).type != type_:
            raise EventRefused(
                Reason.ARROW, f"column '{name}' is of type {schema.field(places[0]).type}; it has to be {type_}"
            )
        chosen[name] = places[0]
    return chosen


def _table(kind: Kind, columns: Mapping[str, Any] | pa.Table) -> pa.Table:
    if isinstance(columns, pa.Table):
        columns = {name: columns.column(name) for name in columns.column_names}
    known = REQUIRED[kind] | OPTIONAL[kind]
    for name in REQUIRED[kind]:
        if name not in columns:
            raise EventError(f"a batch of {kind}s needs a column '{name}'")
    arrays = {}
    for name, values in columns.items():
        if name not in known:
            raise EventError(f"a batch of {kind}s has no column '{name}'; it has {', '.join(known)}")
        try:
            arrays[name] = (
                values.cast(known[name])
                if isinstance(values, pa.Array | pa.ChunkedArray)
                else pa.array(values, known[name])
            )
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise EventError(f"column '{name}' cannot become {known[name]}: {error}") from None
    return pa.table(arrays)


def _stream(table: pa.Table, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _envelope(events: Sequence[Event]) -> dict[str, Any]:
    return {
        "id": [event.id for event in events],
        "source": [event.source for event in events],
        "time": [_moment(event) for event in events],
    }


def _moment(event: Event) -> datetime:
    """To the microsecond: `Event.seconds` is whole."""
    return msgspec.json.decode(event.value, type=_Timed).time or datetime.fromtimestamp(event.seconds, UTC)


class _Timed(msgspec.Struct):
    time: datetime | None = None


def _interactions(events: Sequence[Event]) -> dict[str, Any]:
    data = [event.data for event in events if isinstance(event.data, InteractionData)]
    return {
        **_envelope(events),
        "type": [d.type for d in data],
        "user": [canonical(d.user) for d in data],
        "item": [canonical(d.item) for d in data],
        "ranking": [d.ranking for d in data],
        "value": [d.value for d in data],
        "position": [d.position for d in data],
    }


def _rankings(events: Sequence[Event]) -> dict[str, Any]:
    data = [event.data for event in events if isinstance(event.data, RankingData)]
    return {
        **_envelope(events),
        "request_id": [d.request_id for d in data],
        "user": [canonical(d.user) for d in data],
        "items": [[canonical(item.id) for item in d.items] for d in data],
        "score": [[item.score for item in d.items] for d in data],
        "position": [[item.position for item in d.items] for d in data],
        "propensity": [[item.propensity for item in d.items] for d in data],
        "model": [d.model for d in data],
        "version": [d.version for d in data],
        "arms": [_json(d.arms) if d.arms else None for d in data],
        "user_features": [_json(d.user_features) for d in data],
        "context": [_json(d.context) for d in data],
        "history": [None if d.history is None else [canonical(item) for item in d.history] for d in data],
        "item_features": [_json(d.item_features) for d in data],
        "shown": [d.shown for d in data],
    }


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
