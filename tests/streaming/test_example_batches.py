"""Joined examples as Arrow messages: what is read is what was written, and nothing else is taken for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.encoder import FeatureEncoder
from engine.data.numeric import NumericTransforms
from engine.errors import EventError, SchemaError
from engine.schema import FeatureSpec, Schema
from engine.streaming.join.emitted import Emitted
from engine.streaming.join.example_schema import schema_id
from engine.streaming.join.examples import JoinedExamples, decode_examples, encode_examples, joined_examples
from engine.streaming.join.pending import PendingExamples
from tests.streaming.served_world import ENCODER, NUMERIC, SCHEMA, catalogue, columns, ranking


def examples(count: int, seed: int = 0) -> JoinedExamples:
    """Two shown items a ranking, with histories and tags of different lengths."""
    random = np.random.default_rng(seed)
    data = [
        ranking(
            f"r{n}",
            f"user-{n % 7}",
            [str(1 + n % 3), "🎈"],
            user_features={"visits": float(n), "likes": ["a", "b"][: n % 3]},
            history=[str(k) for k in range(n % 5)],
        )
        for n in range(-(-count // 2))
    ]
    pending = PendingExamples(ENCODER, catalogue())
    slot = pending.add(columns(data)).slot[:count]
    labels = random.choice(np.array([0, 1, np.nan], np.float32), (count, 2))
    numbers = random.integers(-(2**63), 2**63 - 1, count)
    kind = random.integers(0, 3, count).astype(np.int8)
    weight, rate = random.random((2, count)).astype(np.float32)
    seconds, none = random.random(count) * 2e9, np.empty(0, np.int64)
    emitted = Emitted(slot, numbers, numbers, labels, weight, rate, seconds, kind, none, none)
    return joined_examples(pending.take(slot), emitted, SCHEMA.tasks)


def assert_equal(a: JoinedExamples, b: JoinedExamples) -> None:
    assert a.batch.ids.keys() == b.batch.ids.keys()
    assert torch.equal(a.batch.ids.values(), b.batch.ids.values())
    assert torch.equal(a.batch.ids.lengths(), b.batch.ids.lengths())
    for name in ("dense_user", "dense_item", "user_of_target", "weight", "time", "user_key", "item_key"):
        assert torch.equal(getattr(a.batch, name), getattr(b.batch, name)), name
        assert getattr(a.batch, name).dtype == getattr(b.batch, name).dtype
    for task in SCHEMA.tasks:
        assert torch.equal(a.batch.labels[task].nan_to_num(-1), b.batch.labels[task].nan_to_num(-1))
    for name in ("rate", "seconds", "kind", "request"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 80), st.integers(0, 9), st.sampled_from([6_000, 12_000, 900_000]))
def test_what_is_read_is_what_was_written_in_messages_of_any_size(count: int, seed: int, most: int) -> None:
    written = examples(count, seed)
    messages = encode_examples(ENCODER, written, most)
    assert all(len(message) <= most for message in messages)
    assert_equal(decode_examples(ENCODER, messages), written)
    if messages:
        first = decode_examples(ENCODER, messages[:1])
        assert first.request.tolist() == written.request[: len(first)].tolist()


def test_a_message_holds_as_many_examples_as_fit() -> None:
    messages = encode_examples(ENCODER, examples(5_000))
    assert max(map(len, messages)) <= 900_000
    assert len(messages) == -(-sum(map(len, messages)) // 900_000)


def test_an_example_that_is_larger_than_a_message_is_an_error() -> None:
    with pytest.raises(EventError, match=r"an example of [0-9,]+ bytes is larger than a message of 2,000"):
        encode_examples(ENCODER, examples(3), 2_000)


def opened(message: bytes) -> pa.Table:
    with pa.ipc.open_stream(message) as reader:
        return reader.read_all()


def closed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_columns_are_taken_by_name() -> None:
    written = examples(9)
    table = opened(encode_examples(ENCODER, written)[0])
    names = [*reversed(table.column_names)]
    moved = table.select(names).append_column("of another time", pa.array(range(9)))
    assert_equal(decode_examples(ENCODER, [closed(moved)]), written)


def replaced(table: pa.Table, name: str, column: Any) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, pa.field(name, column.type), column)


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("brand", None, r"have 0 columns 'brand' in place of 1"),
        ("brand", pa.array(["a", "b", "c"]), r"column 'brand' holds string, not int64"),
        ("brand", pa.array([1, None, 2]), r"column 'brand' holds nulls"),
        ("past", pa.array([[1], [None], []], pa.list_(pa.int64())), r"column 'past' holds nulls"),
        ("past", pa.array([[1.0], [], []]), r"column 'past' holds list<item: double>"),
        ("price", pa.array([0, np.nan, 1], pa.float32()), r"column 'price' holds nan"),
        (":weight", pa.array([1, np.inf, 1], pa.float32()), r"column ':weight' holds inf"),
        (":label.click", pa.array([1, np.nan, 7], pa.float32()), r"column ':label.click' holds 7"),
    ],
)
def test_a_column_that_cannot_be_trained_is_an_error_that_names_it(name: str, column: Any, reason: str) -> None:
    table = opened(encode_examples(ENCODER, examples(3))[0])
    wrong = table.drop_columns([name]) if column is None else replaced(table, name, column)
    with pytest.raises(EventError, match=reason):
        decode_examples(ENCODER, [closed(wrong)])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_message_is_an_error_or_reads_as_examples_and_never_anything_else(data: Any) -> None:
    message = bytearray(encode_examples(ENCODER, examples(5))[0])
    if data.draw(st.booleans()):
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    else:
        message[data.draw(st.integers(0, len(message) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode_examples(ENCODER, [bytes(message)])
    except (EventError, SchemaError):
        return
    assert len(read) == read.batch.targets


def test_examples_of_another_model_are_refused_by_name() -> None:
    message = encode_examples(ENCODER, examples(3))
    fewer = Schema(features=SCHEMA.features[:-1], user="user", item="item", time="time", tasks=SCHEMA.tasks)
    with pytest.raises(SchemaError, match=rf"another model \(schema {schema_id(ENCODER)}, this one's is"):
        decode_examples(FeatureEncoder(fewer, NUMERIC), message)


def test_an_id_of_a_schema_follows_features_and_transforms() -> None:
    numbers = [FeatureSpec(name="price", kind="numeric")]
    schema = Schema(features=tuple(numbers))

    def made(schema: Schema, *values: float) -> str:
        numeric = NumericTransforms.fit({"price": [np.array(values, np.float32)]}, numbers, len(values))
        return schema_id(FeatureEncoder(schema, numeric))

    assert made(schema, 1, 2) == made(Schema(features=tuple(numbers)), 1, 2)
    assert made(schema, 1, 2) != made(schema, 1, 3)
    assert made(schema, 1, 2) != made(Schema(features=tuple(numbers), tasks=("order",)), 1, 2)


def test_no_message_is_no_example() -> None:
    assert len(decode_examples(ENCODER, [])) == 0
    assert encode_examples(ENCODER, examples(0)) == []
