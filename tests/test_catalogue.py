"""The catalogue: ids to rows and back, attributes, encoded features, on disk and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalogue import ENCODED, TABLE, ArrowCatalogue
from engine.data.encoding import MISSING, Encoded
from engine.errors import BundleError, SchemaError
from engine.hashing import fingerprint

ANY_SPEED = settings(deadline=None)  # a loaded machine is no failure


def films() -> ArrowCatalogue:
    table = pa.table({"id": ["7", "用户", "a"], "title": ["Seven", None, ""], "genre": ["crime", "war", None]})
    encoded = {
        "genre": Encoded(np.array([fingerprint("crime"), fingerprint("war"), MISSING, MISSING])),
        "tags": Encoded(np.array([1, 2, 3]), np.array([0, 2, 2, 3, 3])),
        "year": Encoded(np.array([0.5, -0.5, 0, 0], np.float32)),
    }
    return ArrowCatalogue(table, "id", encoded, title="title", columns={"kind": "genre"})


def test_ids_find_their_rows_and_unknown_ones_are_minus_one() -> None:
    catalogue = films()
    assert catalogue.rows(["a", "no", "7", "用户"]).tolist() == [2, -1, 0, 1]
    assert catalogue.ids(np.array([2, 0])) == ["a", "7"]
    assert len(catalogue) == 3


@ANY_SPEED
@given(st.lists(st.text(max_size=8), unique=True, max_size=30), st.lists(st.text(max_size=8), max_size=30))
def test_any_ids_are_found_as_in_a_dictionary(ids: list[str], asked: list[str]) -> None:
    catalogue = ArrowCatalogue(pa.table({"id": pa.array(ids, pa.string())}), "id")
    place = {text: row for row, text in enumerate(ids)}
    assert catalogue.rows(asked + ids).tolist() == [place.get(text, -1) for text in asked + ids]


def test_the_title_falls_back_to_the_id() -> None:
    assert [films().title(row) for row in range(3)] == ["Seven", "用户", "a"]


def test_columns_by_their_own_and_by_their_features_name() -> None:
    assert films().column("genre").to_pylist() == films().column("kind").to_pylist() == ["crime", "war", None]
    with pytest.raises(SchemaError, match="no column 'genres'"):
        films().column("genres")


def test_an_unknown_row_reads_the_neutral_values_at_the_end() -> None:
    catalogue, rows = films(), np.array([0, -1, 2])
    assert catalogue.encoded["genre"].take(rows)[0].tolist() == [fingerprint("crime"), MISSING, MISSING]
    values, lengths = catalogue.encoded["tags"].take(rows)
    assert lengths is not None
    assert (values.tolist(), lengths.tolist()) == ([1, 2, 3], [2, 0, 1])


def test_saved_and_opened_it_is_the_same(tmp_path: Path) -> None:
    films().save(tmp_path)
    again = ArrowCatalogue.open(tmp_path)
    assert again.table.to_pydict() == films().table.to_pydict()
    assert (again.key, again.title_column, again.columns) == ("id", "title", {"kind": "genre"})
    for name, column in films().encoded.items():
        assert np.array_equal(again.encoded[name].values, column.values)
        assert again.encoded[name].values.dtype == column.values.dtype
        assert (again.encoded[name].offsets is None) == (column.offsets is None)


@pytest.mark.parametrize("name", [TABLE, ENCODED])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    films().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(BundleError, match="the catalogue cannot be read"):
        ArrowCatalogue.open(tmp_path)


def test_an_id_in_two_rows_is_refused() -> None:
    with pytest.raises(SchemaError, match="id 'a' stands in more than one row"):
        ArrowCatalogue(pa.table({"id": ["a", "b", "a"]}), "id")


def test_without_items_everything_is_unknown(tmp_path: Path) -> None:
    empty = ArrowCatalogue(pa.table({"id": pa.array([], pa.string())}), "id")
    assert empty.rows(["a"]).tolist() == [-1]
    empty.save(tmp_path)
    assert len(ArrowCatalogue.open(tmp_path)) == 0
