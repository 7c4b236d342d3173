"""Files of every format are read alike, in pieces, and a broken one is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from engine.data.readers import BATCH_ROWS, Table, find
from engine.errors import DataError

TABLE = pa.table({"id": ["007", "8", None], "n": [1, 2, 3], "name": ["ä|b", "c", ""]})


def _arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _gzip(table: pa.Table, path: Path) -> None:
    with pa.output_stream(str(path), compression="gzip") as sink:
        csv.write_csv(table, sink)


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "t.parquet": lambda table, path: pq.write_table(table, path, row_group_size=2),
    "t.csv": lambda table, path: csv.write_csv(table, path),
    "t.csv.gz": _gzip,
    "t.tsv": lambda table, path: csv.write_csv(table, path, csv.WriteOptions(delimiter="\t")),
    "t.arrow": _arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_columns(tmp_path: Path, name: str) -> None:
    WRITERS[name](TABLE, tmp_path / name)
    table = Table((tmp_path / name, tmp_path / name), text=frozenset({"id", "name"}))
    assert table.columns() == ["id", "n", "name"]
    found = table.read(["n", "id"])
    assert found.column_names == ["n", "id"]
    assert found["id"].to_pylist() == ["007", "8", None] * 2
    assert found["n"].to_pylist() == [1, 2, 3] * 2


def test_large_files_come_in_pieces(tmp_path: Path) -> None:
    rows = BATCH_ROWS * 2 + 5
    pq.write_table(pa.table({"n": range(rows)}), tmp_path / "t.parquet")
    sizes = [batch.num_rows for batch in Table((tmp_path / "t.parquet",)).batches(["n"])]
    assert (sum(sizes), max(sizes)) == (rows, BATCH_ROWS)


def test_a_missing_column_names_those_there(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: no column N; it has id, n, name"):
        Table((tmp_path / "t.parquet",)).read(["N"])


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](TABLE, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        Table((tmp_path / name,)).read()


def test_a_csv_whose_later_rows_break_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,n\na,1\nb,2,3\n")
    with pytest.raises(DataError, match=r"t\.csv: cannot be read"):
        Table((tmp_path / "t.csv",)).read()


def test_an_empty_csv_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(DataError, match=r"t\.csv: cannot be read"):
        Table((tmp_path / "t.csv",)).columns()


def test_an_unknown_suffix_asks_for_the_format(tmp_path: Path) -> None:
    (tmp_path / "t.log").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"set data\.source\.format"):
        Table((tmp_path / "t.log",)).columns()
    assert Table((tmp_path / "t.log",), "csv").columns() == ["a", "b"]


def test_globs_and_plexrank_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.csv", "a.csv"):
        (tmp_path / name).write_text("x\n1\n")
    assert [p.name for p in find(str(tmp_path / "*.csv"))] == ["a.csv", "b.csv"]
    monkeypatch.setenv("PLEXRANK_DATA", str(tmp_path))
    assert find("a.csv") == [tmp_path / "a.csv"]
    with pytest.raises(DataError, match=r"no file matches 'c\.csv' \(PLEXRANK_DATA="):
        find("c.csv")
