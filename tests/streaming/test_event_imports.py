"""Files become events: what is wrong is named by its row, and importing twice gives the same events."""

from __future__ import annotations

import contextlib
import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_records import LIMITS, NOW, click, ranking
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DataError
from engine.events import Event
from engine.streaming.events.import_events import MOST_FAULTS, MOST_LINE, Tally, read_events

ROWS = {
    "user": ["1", "u2", "3"],
    "item": ["7", "i8", "9"],
    "time": [NOW - 30, NOW - 20.5, NOW - 10],
    "type": ["click", "buy", None],
    "ranking": ["r1", None, None],
    "value": [None, 9.5, None],
}


def taken(path: Path, **options: Any) -> tuple[list[Event], Tally]:
    tally = Tally()
    return list(read_events(path, LIMITS, tally, now=NOW, **options)), tally


def written(folder: Path, suffix: str, columns: dict[str, Any] = ROWS) -> Path:
    path, table = folder / f"clicks{suffix}", pa.table(columns)
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([columns, *zip(*columns.values(), strict=True)])
    else:
        make = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".arrow", ".feather"])
def test_a_table_of_interactions_becomes_events_of_the_same_ids_in_every_format(tmp_path: Path, suffix: str) -> None:
    events, tally = taken(written(tmp_path, suffix), source="shop")
    assert (tally.good, tally.refused, tally.faults) == (3, 0, [])
    assert [(e.key, e.data.item, e.data.type, e.data.ranking, e.data.value) for e in events] == [
        ("1", "7", "click", "r1", None),
        ("u2", "i8", "buy", None, 9.5),
        ("3", "9", "click", None, None),
    ]
    assert [json.loads(e.value)["time"] for e in events] == [
        "2026-05-04T11:59:30Z",
        "2026-05-04T11:59:39.500000Z",
        "2026-05-04T11:59:50Z",
    ]
    reference, _ = taken(written(tmp_path, ".parquet"), source="shop")
    assert [(e.source, e.id) for e in events] == [(e.source, e.id) for e in reference]
    assert len({e.id for e in events}) == 3


def test_the_hash_of_a_row_does_not_see_how_its_ids_are_stored(tmp_path: Path) -> None:
    text = {"user": ["1"], "item": ["2"], "time": ["2026-05-04T10:00:00+00:00"]}
    numbers = {"user": [1], "item": [2.0], "time": [datetime(2026, 5, 4, 10, tzinfo=UTC)]}
    ids = {taken(written(tmp_path, ".parquet", columns))[0][0].id for columns in (text, numbers)}
    assert len(ids) == 1
    (later,), _ = taken(written(tmp_path, ".parquet", text | {"time": ["2026-05-04T10:00:01Z"]}))
    assert later.id not in ids


@pytest.mark.parametrize(
    "moment",
    [
        NOW - 60,
        int(NOW) - 60,
        "2026-05-04T11:59:00Z",
        "2026-05-04 13:59:00+02:00",
        "2026-05-04T11:59:00",
        str(int(NOW) - 60),
        datetime(2026, 5, 4, 11, 59),
        datetime(2026, 5, 4, 11, 59, tzinfo=UTC),
        pa.scalar(1777895940_000000001, pa.timestamp("ns")),
    ],
)
def test_a_time_is_seconds_or_iso_or_a_timestamp(tmp_path: Path, moment: Any) -> None:
    (event,), _ = taken(written(tmp_path, ".parquet", {"user": ["u"], "item": ["i"], "time": [moment]}))
    assert event.seconds == int(NOW) - 60


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"user": None}, "user"),
        ({"item": ""}, "item"),
        ({"item": "i" * 257}, "longer than 256"),
        ({"time": None}, "time is missing"),
        ({"time": "yesterday"}, "time 'yesterday' is neither"),
        ({"time": NOW * 1000}, "milliseconds are to be divided"),
        ({"time": -1.0}, "no number of seconds since 1970"),
        ({"time": "nan"}, "no number of seconds"),
        ({"time": NOW + 100_000}, "a day ahead"),
        ({"value": "much"}, "value 'much' is no number"),
        ({"value": float("inf")}, "value is not finite"),
        ({"type": "t" * 65}, "type"),
        ({"user": b"\xff"}, "user is not UTF-8"),
        ({"user": {"a": 1}}, "user"),
        ({"user": 1.5}, "user"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    good = {"user": "u", "item": "i", "time": NOW - 5, "type": "click", "value": 1.0}
    path = tmp_path / "a.arrow"
    tables = [pa.Table.from_pylist([row]) for row in (good, good | changes)]
    for number, table in enumerate(tables, 1):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        events, tally = taken(path)
        assert (len(events), tally.good, tally.refused) == (2 - number, 2 - number, number - 1)
    assert tally.faults[0].startswith(f"{path}: row 1: ")
    assert why in tally.faults[0]


def test_a_csv_keeps_zeros_and_counts_the_rows_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"user",item,extra,time\n'
        b"007,1,x,1700000000\n"
        b"1,2\n"
        b'8,"a, b",x,1700000001\n'
        b"\xff,1,x,1700000002\n"
        b"1,2,3,4,5\n"
        b"9,,x,1700000003\n"
        b"10,1,x,1700000004\n"
    )
    events, tally = taken(path)
    assert [(e.key, e.data.item) for e in events] == [("007", "1"), ("8", "a, b"), ("10", "1")]
    assert (tally.good, tally.refused) == (3, 4)
    assert {fault.removeprefix(f"{path}: ").partition(":")[0] for fault in tally.faults} == {
        "row 2",
        "row 4",
        "row 5",
        "row 6",
    }


def test_lines_are_cloudevents_and_what_is_wrong_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    lines = [json.dumps(click()), "", "{", json.dumps(ranking()), json.dumps(click(id=""))]
    path.write_text("\n".join(lines) + "\n" + "x" * (2 * MOST_LINE + 5) + "\n" + json.dumps(click(id="last")))
    events, tally = taken(path)
    assert [e.id for e in events] == ["e1", "r", "last"]
    assert (tally.good, tally.refused) == (3, 3)
    assert [fault.split(":")[1] for fault in tally.faults] == ["3", "5", "6"]


def test_a_hundred_refusals_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("{\n" * 250)
    _, tally = taken(path)
    assert (tally.refused, len(tally.faults)) == (250, MOST_FAULTS)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, {"user": ["u"], "movie": ["i"], "time": [1.0]})
    with pytest.raises(DataError, match="needs one column each of user, item, time; it has user, movie, time"):
        taken(path)


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.arrow", "a.feather", "a.ndjson", "a.xlsx", "gone.csv", "gone.jsonl"]
)
def test_a_file_that_is_not_what_it_is_called_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not name.startswith("gone"):
        path.write_bytes(b"\x00\xff" * 50)
    if name == "a.ndjson":
        assert taken(path)[1].refused == 1
        return
    with pytest.raises(DataError, match=name):
        taken(path)


def test_events_come_while_the_file_is_read(tmp_path: Path) -> None:
    path, tally = tmp_path / "a.csv", Tally()
    path.write_text("user,item,time\n" + "".join(f"{n},1,{1_700_000_000 + n}\n" for n in range(200_000)))
    events = read_events(path, LIMITS, tally, now=NOW)
    assert next(events).key == "0"
    assert tally.good == 1
    assert sum(1 for _ in events) == 199_999


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".parquet", ".csv", ".tsv", ".arrow", ".feather", ".ndjson"]))
def test_any_bytes_in_a_file_give_events_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    for value in (raw, b"user,item,time\n" + raw):
        path.write_bytes(value)
        with contextlib.suppress(DataError):
            taken(path)
