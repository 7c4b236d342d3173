"""Joined examples as Arrow record batches: what one learner joined, another reads at the speed of arrays.

A message is one Arrow IPC stream with one record batch. A feature is a column of its name: int64 fingerprints, lists of
them where a row has any number, or float32 numbers as they reach the model. Beside them stand `:label.<task>` (float32,
NaN: the row says nothing of the task), `:weight`, `:rate`, `:seconds`, `:kind`, `:request`, and where the schema has
them `:user`, `:item`, `:time`. Columns are taken by name, so others may be added and the order is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from engine.batch import Batch
from engine.data.encoder import FeatureEncoder, Values
from engine.errors import EventError, SchemaError
from engine.streaming.join.emitted import Emitted
from engine.streaming.join.example_schema import schema_id

MOST_BYTES = 900_000
"""Of a message; brokers refuse more than 1 MB by default."""

_SCHEMA = b"plexrank.schema"
_MARGIN = 4_096


@dataclass(frozen=True)
class JoinedExamples:
    """B examples. batch: with labels (NaN: not said) and weight. rate float32, seconds float64, kind int8, request
    int64 [B]: as in `Emitted`."""

    batch: Batch
    rate: np.ndarray
    seconds: np.ndarray
    kind: np.ndarray
    request: np.ndarray

    def __len__(self) -> int:
        return len(self.seconds)


def joined_examples(batch: Batch, emitted: Emitted, tasks: Sequence[str]) -> JoinedExamples:
    """What was emitted, with its features: `batch` is that of `emitted.slot`, and gets labels and weight."""
    batch.labels = {task: torch.from_numpy(emitted.labels[:, t].copy()) for t, task in enumerate(tasks)}
    batch.weight = torch.from_numpy(emitted.weight)
    return JoinedExamples(batch, emitted.rate, emitted.seconds, emitted.kind, emitted.request)


def encode_examples(encoder: FeatureEncoder, examples: JoinedExamples, most_bytes: int = MOST_BYTES) -> list[bytes]:
    """Messages of at most `most_bytes`, in order. EventError where one example alone is larger."""
    if not len(examples):
        return []
    table = _record(encoder, examples)
    messages, start = [], 0
    while start < table.num_rows:
        share = (most_bytes - _MARGIN) / max(1, table.slice(start).nbytes)
        count = max(1, min(table.num_rows - start, int(share * (table.num_rows - start))))
        message = _message(table.slice(start, count))
        while len(message) > most_bytes:
            if count == 1:
                raise EventError(f"an example of {len(message):,} bytes is larger than a message of {most_bytes:,}")
            count //= 2
            message = _message(table.slice(start, count))
        messages.append(message)
        start += count
    return messages


def decode_examples(encoder: FeatureEncoder, messages: Sequence[bytes]) -> JoinedExamples:
    """The examples of messages, behind one another; no message gives no example.

    EventError: a message is damaged, lacks a column, or has one of another type. SchemaError: it is of another model.
    """
    wanted, known = _layout(encoder), schema_id(encoder)
    tables = [_read(message, wanted, known) for message in messages] or [wanted.empty_table()]
    table = pa.concat_tables(tables).combine_chunks()
    size, schema = table.num_rows, encoder.schema
    ids: dict[str, Values] = {}
    numbers: dict[str, np.ndarray] = {}
    for feature in schema.features:
        column = _whole(table, feature.name)
        if feature.is_dense:
            numbers[feature.name] = column.to_numpy()
        elif feature.is_jagged:
            offsets = column.offsets.to_numpy().astype(np.int64)
            ids[feature.name] = (column.values.to_numpy()[offsets[0] : offsets[-1]], np.diff(offsets))
        else:
            ids[feature.name] = (column.to_numpy(), None)
    batch = encoder.assemble(ids, numbers, size, size)
    batch.user_of_target = torch.arange(size)
    other = {name: _whole(table, name).to_numpy().copy() for name in wanted.names if name.startswith(":")}
    batch.labels = {task: torch.from_numpy(other[f":label.{task}"]) for task in schema.tasks}
    batch.weight = torch.from_numpy(other[":weight"])
    keys = (other.get(f":{name}") for name in ("time", "user", "item"))
    batch.time, batch.user_key, batch.item_key = (None if key is None else torch.from_numpy(key) for key in keys)
    return JoinedExamples(batch, other[":rate"], other[":seconds"], other[":kind"], other[":request"])


def _layout(encoder: FeatureEncoder) -> pa.Schema:
    """The columns that are written and asked for."""
    schema = encoder.schema
    fields = []
    for feature in schema.features:
        kind = pa.float32() if feature.is_dense else pa.list_(pa.int64()) if feature.is_jagged else pa.int64()
        fields.append((feature.name, kind))
    fields += [(f":label.{task}", pa.float32()) for task in schema.tasks]
    fields += [(":weight", pa.float32()), (":rate", pa.float32()), (":seconds", pa.float64())]
    fields += [(":kind", pa.int8()), (":request", pa.int64())]
    fields += [(f":{name}", pa.int64()) for name in ("time", "user", "item") if getattr(schema, name)]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def _record(encoder: FeatureEncoder, examples: JoinedExamples) -> pa.RecordBatch:
    schema, batch = encoder.schema, examples.batch
    columns: dict[str, pa.Array] = {}
    for name, jagged in batch.jagged().items():
        values = pa.array(jagged.values().numpy())
        if schema[name].is_jagged:
            offsets = np.concatenate([[0], np.cumsum(jagged.lengths().numpy())])
            values = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
        columns[name] = values
    for dense, of_item in ((batch.dense_user, False), (batch.dense_item, True)):
        features = [f.name for f in schema.dense if f.from_request is not of_item]
        columns |= {name: pa.array(dense[:, j].contiguous().numpy()) for j, name in enumerate(features)}
    columns |= {f":label.{task}": pa.array(batch.labels[task].numpy()) for task in schema.tasks}
    assert batch.weight is not None
    columns |= {":weight": pa.array(batch.weight.numpy()), ":rate": pa.array(examples.rate)}
    columns |= {":seconds": pa.array(examples.seconds), ":kind": pa.array(examples.kind)}
    columns[":request"] = pa.array(examples.request)
    keys = {":time": batch.time, ":user": batch.user_key, ":item": batch.item_key}
    columns |= {name: pa.array(key.numpy()) for name, key in keys.items() if key is not None}
    layout = _layout(encoder).with_metadata({_SCHEMA: schema_id(encoder).encode()})
    return pa.record_batch([columns[name].cast(layout.field(name).type) for name in layout.names], schema=layout)


def _message(record: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.schema) as writer:
        writer.write_batch(record)
    return sink.getvalue().to_pybytes()


def _read(message: bytes, wanted: pa.Schema, known: str) -> pa.Table:
    try:
        with pa.ipc.open_stream(message) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EventError(f"not a message of joined examples: {error}") from None
    theirs = (table.schema.metadata or {}).get(_SCHEMA, b"").decode(errors="replace")
    if theirs != known:
        raise SchemaError(
            f"the examples are of another model (schema {theirs or 'not named'}, this one's is {known}): "
            "read a stream that a learner of this configuration and this bundle's transforms writes"
        )
    columns = []
    for field in wanted:
        places = table.schema.get_all_field_indices(field.name)
        if len(places) != 1:
            raise EventError(f"joined examples have {len(places)} columns '{field.name}' in place of 1")
        columns.append(_checked(table.column(places[0]), field))
    return pa.table(columns, schema=wanted)


def _checked(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column, where it is of the field's type and every value can be trained."""
    what = f"joined examples: column '{field.name}'"
    lists = pa.types.is_list(field.type)
    if column.type != field.type and not (
        lists and pa.types.is_list(column.type) and column.type.value_type == field.type.value_type
    ):
        raise EventError(f"{what} holds {column.type}, not {field.type}")
    if column.null_count or (lists and pc.list_flatten(column).null_count):
        raise EventError(f"{what} holds nulls")
    if pa.types.is_floating(field.type):
        values = column.to_numpy()
        label = field.name.startswith(":label.")
        good = (np.isnan(values) | ((values >= 0) & (values <= 1))) if label else np.isfinite(values)
        if not good.all():
            raise EventError(f"{what} holds {values[np.argmin(good)]}")
    return column if column.type == field.type else column.cast(field.type)


def _whole(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
