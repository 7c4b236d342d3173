"""The catalogue: ids to rows and back, attributes, encoded features, on disk and again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalogue import ENCODED, TABLE, ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.data.encoding import MISSING, Encoded
from engine.data.numeric import NumericTransforms, Transform
from engine.errors import BundleError, SchemaError
from engine.hashing import fingerprint
from engine.schema import FeatureSpec, Schema

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


# --------------------------------------------------------------------------------------------------------- growth
SCHEMA = Schema(
    features=(
        FeatureSpec(name="item_id"),
        FeatureSpec(name="genre"),
        FeatureSpec(name="tags", kind="multi", max_length=3),
        FeatureSpec(name="year", kind="numeric"),
        FeatureSpec(name="age", kind="numeric", column="released", transform="bins"),
        FeatureSpec(name="shelf"),
    ),
    item="item_id",
)
NUMERIC = NumericTransforms(
    {
        "year": Transform(mean=2000.0, std=10.0),
        "age": Transform(edges=np.array([1990.0]), ids=np.array([11, 12, fingerprint("")])),
    }
)
COLUMNS = {
    "item_id": ["a", "b", "c"],
    "title": ["A", "B", None],
    "genre": ["war", None, "crime"],
    "tags": ["x|y", None, "z"],
    "year": [1990, 2010, None],
    "released": [1980, 2000, None],
}


def encoded_from(columns: dict[str, list[Any]], encoder: FeatureEncoder) -> dict[str, Encoded]:
    """As a bundle's catalogue is encoded: every column at once, and what an unknown item reads at the end."""
    sources = {"item_id": "item_id", "genre": "genre", "tags": "tags", "year": "year", "age": "released"}
    return {
        name: encoder.encode_column(name, pa.array(columns[source])).with_neutral(encoder.neutral(encoder.schema[name]))
        for name, source in sources.items()
    }


def small() -> tuple[ArrowCatalogue, FeatureEncoder]:
    encoder = FeatureEncoder(SCHEMA, NUMERIC)
    table = pa.table(COLUMNS)
    made = ArrowCatalogue(table, "item_id", encoded_from(COLUMNS, encoder), title="title", columns={"age": "released"})
    return made, encoder


def same_encoded(a: Mapping[str, Encoded], b: Mapping[str, Encoded]) -> None:
    assert a.keys() == b.keys()
    for name, column in b.items():
        assert np.array_equal(a[name].values, column.values), name
        assert a[name].values.dtype == column.values.dtype
        if column.offsets is not None:
            assert np.array_equal(a[name].offsets, column.offsets)


def test_items_that_come_or_change_read_as_if_they_had_been_there() -> None:
    before, encoder = small()
    after = before.updated(
        ["b", "new", 7, "b"],
        [
            {"genre": "drama", "tags": ["q"]},
            {"title": "New", "genre": "war", "tags": "x|w|v|u", "year": 2020, "released": 1985},
            {},
            {"year": None, "tags": ["r", "s"], "colour": "red"},
        ],
        encoder,
    )
    columns = {
        "item_id": ["a", "b", "c", "new", "7"],
        "title": ["A", "B", None, "New", None],
        "genre": ["war", "drama", "crime", "war", None],
        "tags": ["x|y", "r|s", "z", "x|w|v|u", None],
        "year": [1990, None, None, 2020, None],
        "released": [1980, 2000, None, 1985, None],
    }
    assert after.table.to_pydict() == columns
    same_encoded(after.encoded, encoded_from(columns, encoder))
    assert after.rows(["7", "a", "new", "b", "no", "c"]).tolist() == [4, 0, 3, 1, -1, 2]
    assert after.ids(np.arange(5)) == columns["item_id"]
    assert [after.title(row) for row in range(5)] == ["A", "B", "c", "New", "7"]
    assert before.table.to_pydict() == COLUMNS  # the one before is as it was
    same_encoded(before.encoded, encoded_from(COLUMNS, encoder))
    assert len(before) == 3
    assert before.rows(["new"]).tolist() == [-1]
    assert after.changed_values(np.array([0, 2])) == before.changed_values(np.array([0, 1])) == {}
    assert after.changed_values(np.array([3, -1, 1, 0])) == {
        "genre": ["war", None, "drama", None],
        "tags": ["x|w|v|u", None, ["r", "s"], None],
        "year": [2020, None, "nan", None],
        "age": [1985, None, None, None],
    }


def test_what_is_named_as_changed_encodes_as_it_is_served() -> None:
    """So that who has only the bundle reads of a ranking's items what was read here."""
    before, encoder = small()
    after = before.updated(["a", "n"], [{"genre": None, "tags": None, "year": None}, {"tags": ["k", "l"]}], encoder)
    rows = np.array([0, 3, 1])
    given = after.changed_values(rows)
    request = ScoreRequest({}, {}, after.ids(rows), item_features=given)
    served = after.encoded
    batch = encoder.encode_request(request, before).ids.to_dict()
    assert batch["tags"].values().tolist() == served["tags"].take(rows)[0].tolist()
    assert batch["genre"].values().tolist() == served["genre"].take(rows)[0].tolist()
    assert encoder.encode_request(request, before).dense_item[:, 0].tolist() == served["year"].take(rows)[0].tolist()


def test_a_feature_the_bundle_knew_of_no_item_is_known_of_those_that_say_it() -> None:
    before, encoder = small()
    assert "shelf" not in before.encoded
    after = before.updated(["b"], [{"shelf": "top"}], encoder).updated(["d"], [{}], encoder)
    assert after.encoded["shelf"].values.tolist() == [MISSING, fingerprint("top"), MISSING, MISSING, MISSING]


def test_raw_columns_take_what_they_could_not_hold() -> None:
    before, encoder = small()
    after = before.updated(["a", "n"], [{"year": 1990.5}, {"title": 5, "genre": 3}], encoder)
    assert after.column("year").to_pylist() == [1990.5, 2010.0, None, None]
    assert after.column("title").to_pylist() == ["A", "B", None, "5"]
    with pytest.raises(SchemaError, match="'year' is numeric, got 'old'"):
        before.updated(["a"], [{"year": "old"}], encoder)


def test_a_catalogue_that_has_grown_is_saved_as_any_other(tmp_path: Path) -> None:
    before, encoder = small()
    after = before
    for n in range(70):
        after = after.updated([f"n{n}"], [{"tags": [str(n)]}], encoder)
    after.save(tmp_path)
    again = ArrowCatalogue.open(tmp_path)
    assert again.table.to_pydict() == after.table.to_pydict()
    same_encoded(again.encoded, after.encoded)


ITEM = st.sampled_from([*"abcdefg"])
TAGS = st.none() | st.lists(st.sampled_from([*"xyzw"]), max_size=5)
CHANGE = st.fixed_dictionaries(
    {},
    optional={
        "genre": st.none() | st.sampled_from(["war", "art"]),
        "tags": TAGS,
        "year": st.none() | st.integers(1900, 2100),
    },
)


@ANY_SPEED
@given(st.lists(st.lists(st.tuples(ITEM, CHANGE), max_size=6), max_size=5), st.sampled_from([0, 2, 1024]))
def test_any_batches_of_changes_end_as_one_table_would(
    batches: list[list[tuple[str, dict[str, Any]]]], beside: int
) -> None:
    """Every catalogue on the way stays what it was, also where what lies beside its columns is written into them."""
    catalogue, encoder = small()
    truth = {item: {k: v[n] for k, v in COLUMNS.items()} for n, item in enumerate("abc")}
    on_the_way = [(catalogue, dict(COLUMNS))]
    with mock.patch("engine.grown_columns._BESIDE", beside):
        for batch in batches:
            catalogue = catalogue.updated([item for item, _ in batch], [change for _, change in batch], encoder)
            for item, change in batch:
                blank = dict.fromkeys(COLUMNS) | {"item_id": item}
                truth.setdefault(item, blank).update(change)
            columns = {name: [row[name] for row in truth.values()] for name in COLUMNS}
            columns["tags"] = ["|".join(t) or None if isinstance(t, list) else t for t in columns["tags"]]
            on_the_way.append((catalogue, columns))
    for then, columns in on_the_way:
        assert_holds(then, columns, encoder)


def assert_holds(catalogue: ArrowCatalogue, columns: Mapping[str, list[Any]], encoder: FeatureEncoder) -> None:
    """By rows in any order, an unknown one among them, and then as a whole."""
    ids, total = columns["item_id"], len(columns["item_id"])
    rows = np.random.default_rng(total).permutation(np.append(np.arange(total), -1))
    known, wanted = rows[rows >= 0], encoded_from(dict(columns), encoder)
    for name, column in wanted.items():
        for mine, theirs in zip(catalogue.encoded[name].take(rows), column.take(rows), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert len(catalogue.encoded[name]) == total + 1
    for name, values in columns.items():
        assert catalogue.raw(name, known) == [values[row] for row in known]
    assert catalogue.ids(known) == [ids[row] for row in known]
    assert catalogue.rows([*ids, "nobody's"]).tolist() == [*range(total), -1]
    assert [catalogue.title(row) for row in range(total)] == [
        title or item for title, item in zip(columns["title"], ids, strict=True)
    ]
    same_encoded(catalogue.encoded, wanted)
    assert catalogue.table.to_pydict() == dict(columns)


def test_two_catalogues_may_grow_from_one() -> None:
    """The second finds the room behind the first's rows taken."""
    before, encoder = small()
    one = before.updated(["n"], [{"year": 1}], encoder)
    two, three = one.updated(["p"], [{"year": 2}], encoder), one.updated(["q", "r"], [{"year": 3}, {}], encoder)
    assert two.ids(np.arange(5)) == ["a", "b", "c", "n", "p"]
    assert three.ids(np.arange(6)) == ["a", "b", "c", "n", "q", "r"]
    assert two.rows(["p", "q"]).tolist() == [4, -1]
    assert three.rows(["p", "q", "r"]).tolist() == [-1, 4, 5]
    assert two.raw("year", np.array([3, 4])) == [1, 2]
    assert three.raw("year", np.array([3, 4, 5])) == [1, 3, None]


def test_the_unknown_reads_nothing_though_rows_came_behind() -> None:
    before, _ = small()
    with pytest.raises(IndexError):
        before.ids(np.array([-1]))
    with pytest.raises(IndexError):
        before.updated(["n"], [{}], FeatureEncoder(SCHEMA, NUMERIC)).ids(np.array([0, -1, 3]))
