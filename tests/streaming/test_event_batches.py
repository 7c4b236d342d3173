"""Many events in one record, as Arrow: the same rows as one by one, by column name, within limits."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from event_records import LIMITS, NOW, click, decoded, ranking, reasons, record
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EventError
from engine.events import decode_event
from engine.streaming.events.arrow_events import MEDIA_TYPE, columns_of, decode_batch, encode_batch
from engine.streaming.events.arrow_size import inflated_size

COLUMNS: dict[str, list[Any]] = {
    "id": ["a", "b", "c"],
    "source": ["shop"] * 3,
    "time": [datetime.fromtimestamp(NOW - 3 + n, UTC) for n in range(3)],
    "type": ["click", "buy", "click"],
    "user": ["u1", "u2", "u1"],
    "item": ["i1", "i2", "i3"],
    "ranking": ["r1", None, ""],
}
RANKINGS: dict[str, list[Any]] = {
    "id": ["a", "b"],
    "source": ["plexrank"] * 2,
    "time": [datetime.fromtimestamp(NOW - 3, UTC)] * 2,
    "request_id": ["r1", "r2"],
    "user": ["u1", "u2"],
    "items": [["i1", "i2"], ["i3"]],
}


def stream(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def table_of(kind: Any = "interaction", columns: Any = COLUMNS) -> pa.Table:
    return decode_batch(encode_batch(kind, columns)[0])[1]


def same_rows(one: Any, other: Any) -> None:
    for name in ("event", "request", "item", "user", "seconds"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    assert [one.type[c] for c in one.code] == [other.type[c] for c in other.code]


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_a_batch_says_what_its_events_say_one_by_one(compression: Any) -> None:
    documents = [
        click(id=f"e{n}", time=f"2026-05-04T11:{n % 60:02}:07.{n:06}Z", data=data)
        for n, data in enumerate(
            {"type": f"t{n % 3}", "user": n % 7, "item": f"ü{n}", **({"ranking": f"r{n}"} if n % 2 else {})}
            for n in range(500)
        )
    ]
    events = [decode_event(json.dumps(d).encode(), LIMITS, NOW) for d in documents]
    (batch,) = encode_batch("interaction", columns_of(events)["interaction"], compression=compression)
    got = decoded(batch)
    assert (got.n, got.dead) == (500, [])
    same_rows(got.interactions, decoded(*documents).interactions)


def test_a_batch_of_rankings_keeps_every_field() -> None:
    documents = [ranking(request_id=f"r{n}") for n in range(20)]
    documents.append(click(id="bare", type="ranking", data={"request_id": "x", "user": "u", "items": [{"id": "i"}]}))
    events = [decode_event(json.dumps(d).encode(), LIMITS, NOW) for d in documents]
    (batch,) = encode_batch("ranking", columns_of(events)["ranking"])
    got, one_by_one = decoded(batch), decoded(*documents)
    assert got.rankings.data == one_by_one.rankings.data
    for name in ("event", "request", "seconds"):
        assert getattr(got.rankings, name).tolist() == getattr(one_by_one.rankings, name).tolist()


def test_batches_stand_in_the_order_of_their_records() -> None:
    (batch,) = encode_batch("interaction", COLUMNS)
    (shown,) = encode_batch("ranking", RANKINGS)
    got = decoded(click(id="first"), batch, click(id="last"), shown, ranking())
    assert got.n == 8
    assert got.interactions.record.tolist() == [0, 1, 1, 1, 2]
    assert [got.interactions.type[c] for c in got.interactions.code] == ["click", "click", "buy", "click", "click"]
    assert got.rankings.record.tolist() == [3, 3, 4]
    assert [d.request_id for d in got.rankings.data] == ["r1", "r2", "r1"]
    assert got.interactions.request[2:4].tolist() == [0, 0], "null and empty name no ranking"


def test_columns_may_stand_in_any_order_and_be_more() -> None:
    table = table_of()
    names = table.column_names
    random.Random(1).shuffle(names)
    grown = table.select(names).append_column("new", pa.array([{"deep": [n]} for n in range(3)]))
    got = decoded(stream(grown))
    assert got.dead == []
    same_rows(got.interactions, decoded(stream(table)).interactions)


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_missing_column_makes_the_batch_unreadable(name: str) -> None:
    got = decoded(stream(table_of().drop_columns([name])), click())
    assert reasons(got) == ["arrow"]
    assert f"0 columns '{name}'" in got.dead[0].detail
    assert (got.n, len(got.interactions)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "type_"), [("user", pa.large_string()), ("time", pa.timestamp("ms", tz="UTC")), ("ranking", pa.binary())]
)
def test_a_column_of_another_type_makes_the_batch_unreadable(name: str, type_: pa.DataType) -> None:
    table = table_of()
    place = table.column_names.index(name)
    got = decoded(stream(table.set_column(place, name, table.column(name).cast(type_))))
    assert reasons(got) == ["arrow"]
    assert f"column '{name}' is of type {type_}" in got.dead[0].detail


def test_a_column_that_stands_twice_makes_the_batch_unreadable() -> None:
    table = table_of()
    assert reasons(decoded(stream(table.append_column("user", table.column("item"))))) == ["arrow"]


def test_a_newer_version_is_left_for_a_newer_reader() -> None:
    table = table_of().replace_schema_metadata({"dataschema": "urn:plexrank:interaction:v2"})
    assert reasons(decoded(stream(table))) == ["version"]


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("id", None, "schema"),
    ("source", "", "schema"),
    ("type", "t" * 65, "schema"),
    ("user", None, "schema"),
    ("item", "i" * 257, "id"),
    ("item", "a\nb", "id"),
    ("ranking", "r" * 257, "schema"),
    ("time", datetime.fromtimestamp(NOW + 1000, UTC), "future"),
    ("time", datetime(1969, 1, 1, tzinfo=UTC), "past"),
    ("value", float("nan"), "nan"),
    ("position", 0, "schema"),
]


@pytest.mark.parametrize(("name", "value", "reason"), BAD_ROWS)
def test_a_bad_row_is_dead_alone_and_can_be_sent_again_alone(name: str, value: Any, reason: str) -> None:
    columns = {"value": [1.0] * 3, "position": [1] * 3, **COLUMNS}
    columns[name] = [columns[name][0], value, columns[name][2]]
    (batch,) = encode_batch("interaction", columns)
    got = decoded(record(batch, 9))
    (dead,) = got.dead
    assert (dead.reason, dead.row, dead.offset) == (reason, 1, 9)
    assert (got.n, len(got.interactions)) == (3, 2)
    again = decode_batch(dead.value)[1]
    assert repr(again.to_pylist()) == repr(table_of(columns=columns).slice(1, 1).to_pylist())
    assert reasons(decoded(dead.value)) == [reason]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("items", None, "schema"),
        ("items", ["i1", None], "schema"),
        ("items", ["i\n"], "id"),
        ("history", ["h", "h" * 257], "id"),
        ("score", [1.0], "schema"),
        ("score", [1.0, float("inf")], "nan"),
        ("propensity", [1.0, 1.5], "schema"),
        ("position", [0, 1], "schema"),
        ("request_id", "", "schema"),
        ("context", "{", "schema"),
        ("context", '{"a": {"b": 1}}', "schema"),
        ("item_features", '{"price": [1]}', "schema"),
        ("item_features", "[" * 10_000, "schema"),
        ("arms", '[{"experiment": "x"}]', "schema"),
    ],
)
def test_a_bad_ranking_is_dead_alone(name: str, value: Any, reason: str) -> None:
    columns = {**RANKINGS, name: [value, RANKINGS.get(name, [None, None])[1]]}
    got = decoded(*encode_batch("ranking", columns))
    assert reasons(got) == [reason]
    assert (got.dead[0].row, [d.request_id for d in got.rankings.data]) == (0, ["r2"])


def test_a_long_batch_is_cut_into_records_that_fit() -> None:
    rng = random.Random(2)
    n = 3000
    columns = {
        **{name: [str(rng.getrandbits(200)) for _ in range(n)] for name in ("id", "source", "user", "item", "ranking")},
        "type": ["click"] * n,
        "time": [datetime.fromtimestamp(NOW, UTC) - timedelta(microseconds=k) for k in range(n)],
    }
    records = encode_batch("interaction", columns, most_bytes=50_000)
    assert max(map(len, records)) <= 50_000
    assert len(records) < 4 * sum(map(len, records)) / 50_000
    together = [id_ for r in records for id_ in decode_batch(r)[1].column("id").to_pylist()]
    assert together == columns["id"]
    with pytest.raises(EventError, match="one interaction takes"):
        encode_batch("interaction", COLUMNS, most_bytes=100)
    assert encode_batch("interaction", {name: [] for name in COLUMNS}) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"user": None}, "needs a column 'user'"),
        ({"usr": ["u"] * 3}, "has no column 'usr'"),
        ({"item": [1, 2, 3]}, "column 'item' cannot become string"),
    ],
)
def test_columns_that_make_no_batch_are_named(changes: dict[str, Any], why: str) -> None:
    columns = {name: values for name, values in {**COLUMNS, **changes}.items() if values is not None}
    with pytest.raises(EventError, match=why):
        encode_batch("interaction", columns)


# -------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_the_size_once_decompressed_is_known_before(compression: Any) -> None:
    table = pa.table({"a": ["x" * 100] * 5000, "b": np.arange(5000.0)})
    size, rows = inflated_size(stream(table, compression))
    assert rows == 5000
    assert table.nbytes <= size <= table.nbytes + 1000


def test_a_small_record_that_would_fill_the_memory_is_refused() -> None:
    columns = {**COLUMNS, "item": ["i" * 1_000_000] * 3}
    (bomb,) = encode_batch("interaction", columns, compression="zstd")
    assert len(bomb) < 10_000
    with pytest.raises(EventError, match="a batch of 3 rows and 3,0"):
        decode_batch(bomb, most_inflated=1_000_000)
    many = pa.table({name: pa.nulls(300_000, t.type) for name, t in zip(COLUMNS, table_of().schema, strict=True)})
    assert "300,000 rows" in decoded(stream(many, "zstd")).dead[0].detail


def test_values_under_a_null_list_are_not_read() -> None:
    offsets, values = pa.array([0, 2, 3], pa.int32()), pa.array([1.0, float("nan"), 3.0])
    scores = pa.ListArray.from_arrays(offsets, values, mask=pa.array([True, False]))
    got = decoded(stream(table_of("ranking", RANKINGS).append_column("score", scores)))
    assert got.dead == []
    assert [[item.score for item in d.items] for d in got.rankings.data] == [[None, None], [3.0]]


def test_a_time_beyond_the_calendar_is_only_in_the_future() -> None:
    table = table_of("ranking", RANKINGS)
    times = pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    got = decoded(stream(table.set_column(table.column_names.index("time"), "time", times)))
    assert reasons(got) == ["future"]
    assert got.rankings.seconds.tolist() == [0.0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_batch_never_raises(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(BATCHES)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for value in (bytes(raw), bytes(raw[:cut])):
        decoded(value, record(value, headers=(("content-type", MEDIA_TYPE.encode()),)))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_that_call_themselves_a_batch_are_dead(value: bytes) -> None:
    got = decoded(record(value, headers=(("content-type", MEDIA_TYPE.encode()),)), b"\xff\xff\xff\xff" + value)
    assert reasons(got) == ["arrow", "arrow"]


BATCHES = [
    encode_batch("interaction", COLUMNS)[0],
    encode_batch("interaction", COLUMNS, compression="zstd")[0],
    encode_batch("ranking", {**RANKINGS, "score": [[1.0, 2.0], None], "context": ['{"a": 1}', None]})[0],
]
