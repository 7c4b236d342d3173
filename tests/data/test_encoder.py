"""The same raw values give the same ids and numbers offline, from a stored column, and online, from a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.data.numeric import NumericTransforms
from engine.errors import SchemaError
from engine.hashing import fingerprint
from engine.schema import FeatureSpec, Schema

ANY_SPEED = settings(deadline=None)  # a loaded machine is no failure

World = Callable[..., Any]

SCHEMA = Schema(
    features=(
        FeatureSpec(name="word"),
        FeatureSpec(name="tags", kind="multi", separator=", ", max_length=3),
        FeatureSpec(name="price", kind="numeric"),
        FeatureSpec(name="clicks", kind="numeric", transform="log"),
        FeatureSpec(name="age", kind="numeric", transform="bins", bins=4),
    )
)
NUMERIC = NumericTransforms.fit(
    {name: [np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)] for name in ("price", "clicks", "age")},
    [f for f in SCHEMA.features if f.kind == "numeric"],
    8,
)
ENCODER = FeatureEncoder(SCHEMA, NUMERIC)
WORDS = st.one_of(st.none(), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12))
NUMBERS = st.one_of(st.none(), st.floats(width=64), st.integers(-(2**40), 2**40).map(float))


@ANY_SPEED
@given(st.lists(WORDS, max_size=20))
def test_categories_are_equal_offline_and_online(values: list[str | None]) -> None:
    offline = ENCODER.encode_column("word", pa.array(values, pa.string()))
    assert offline.values.tolist() == ENCODER.encode_values("word", values).values.tolist()
    assert offline.values.tolist() == [fingerprint(v or "") for v in values]


@ANY_SPEED
@given(st.lists(st.one_of(st.none(), st.integers(-(2**53), 2**53)), max_size=20))
def test_integers_their_text_and_whole_floats_are_equal_offline_and_online(values: list[int | None]) -> None:
    expected = ENCODER.encode_values("word", values).values.tolist()
    text = [None if v is None else str(v) for v in values]
    for column in (pa.array(values, pa.int64()), pa.array(text, pa.string()), pa.array(values, pa.float64())):
        assert ENCODER.encode_column("word", column).values.tolist() == expected


@ANY_SPEED
@given(st.lists(WORDS, max_size=20))
def test_separated_texts_are_equal_offline_and_online(values: list[str | None]) -> None:
    offline = ENCODER.encode_column("tags", pa.array(values, pa.string()))
    online = ENCODER.encode_values("tags", values)
    assert offline.offsets is not None
    assert online.offsets is not None
    assert offline.values.tolist() == online.values.tolist()
    assert offline.offsets.tolist() == online.offsets.tolist()


@ANY_SPEED
@given(st.lists(st.one_of(st.none(), st.lists(WORDS, max_size=5)), max_size=10))
def test_lists_are_equal_offline_and_online(values: list[list[str | None] | None]) -> None:
    offline = ENCODER.encode_column("tags", pa.array(values, pa.list_(pa.string())))
    online = ENCODER.encode_values("tags", values)
    assert offline.offsets is not None
    assert online.offsets is not None
    assert offline.values.tolist() == online.values.tolist()
    assert offline.offsets.tolist() == online.offsets.tolist()


@ANY_SPEED
@given(st.sampled_from(["price", "clicks", "age"]), st.lists(NUMBERS, max_size=20))
def test_numbers_are_equal_offline_and_online_and_always_finite(name: str, values: list[float | None]) -> None:
    offline = ENCODER.encode_column(name, pa.array(values, pa.float64()))
    assert offline.values.tolist() == ENCODER.encode_values(name, values).values.tolist()
    assert np.isfinite(offline.values).all()


def test_separated_text_is_trimmed_emptied_of_blanks_and_cut() -> None:
    column = ENCODER.encode_column("tags", pa.array([" a,  , b , c, d", "", None, "ä"]))
    assert column.offsets is not None
    assert column.offsets.tolist() == [0, 3, 3, 3, 4]
    assert column.values.tolist() == [fingerprint(x) for x in ("a", "b", "c", "ä")]


def test_nan_is_a_missing_id() -> None:
    column = ENCODER.encode_column("word", pa.array([float("nan"), 3.0, None]))
    assert column.values.tolist() == [fingerprint(""), fingerprint("3"), fingerprint("")]
    assert ENCODER.encode_values("word", [float("nan"), 3.0, None]).values.tolist() == column.values.tolist()


def test_text_among_numbers_names_the_feature() -> None:
    with pytest.raises(SchemaError, match="feature 'price' is numeric"):
        ENCODER.encode_column("price", pa.array(["cheap"]))
    with pytest.raises(SchemaError, match="feature 'price' is numeric, got 'cheap'"):
        ENCODER.encode_values("price", ["cheap"])


# ------------------------------------------------------------------------------------------------- requests
FEATURES = [
    {"name": "user", "side": "user"},
    {"name": "age", "side": "user", "kind": "numeric"},
    {"name": "hour", "side": "context"},
    {"name": "item"},
    {"name": "kind"},
    {"name": "tags", "kind": "multi"},
    {"name": "price", "kind": "numeric", "transform": "log"},
    {"name": "history", "kind": "sequence", "of": "item", "max_length": 2},
    {"name": "kinds", "kind": "sequence", "of": "kind", "max_length": 2},
]
LOG = {
    "user": ["u", "u", "u", "v"],
    "item": ["a", "b", "a", "c"],
    "time": [1, 2, 3, 4],
    "label": [1, 1, 0, 0],
    "hour": [7, 8, 9, 9],
}
ITEMS = {"item": ["b", "a"], "kind": ["film", "book"], "tags": ["x|y", None], "price": [10.0, None]}
USERS = {"user": ["u", "v"], "age": [20, 40]}


@pytest.fixture
def prepared(world: World) -> Any:
    return world(LOG, FEATURES, items=ITEMS, users=USERS)


def values(batch: Batch, name: str) -> list[int]:
    return batch.jagged()[name].values().tolist()


def test_a_request_encodes_as_its_row_in_training(prepared: Any) -> None:
    """The third row of the log: user u at hour 9 before item a, having liked a, then b."""
    trained = prepared.batch(np.array([2]))
    request = ScoreRequest(
        user={"user": "u", "age": 20}, context={"hour": 9}, history={"history": ["b", "a"]}, items=["a"]
    )
    served = prepared.encoder.encode_request(request, prepared.catalogue)
    assert served.ids.keys() == trained.ids.keys()
    for name, jagged in trained.jagged().items():
        assert values(served, name) == jagged.values().tolist(), name
        assert served.jagged()[name].lengths().tolist() == jagged.lengths().tolist(), name
    assert torch.equal(served.dense_user, trained.dense_user)
    assert torch.equal(served.dense_item, trained.dense_item)


def test_candidates_share_one_user_and_unknown_ones_keep_their_id(prepared: Any) -> None:
    request = ScoreRequest(user={"user": "u"}, history={"history": ["b", "a", "c"]}, items=["b", "new", "a"])
    batch = prepared.encoder.encode_request(request, prepared.catalogue)
    assert (batch.users, batch.targets) == (1, 3)
    assert batch.user_of_target.tolist() == [0, 0, 0]
    assert values(batch, "user") == [fingerprint("u")]
    assert values(batch, "hour") == [fingerprint("")]
    assert values(batch, "item") == [fingerprint("b"), fingerprint("new"), fingerprint("a")]
    assert values(batch, "kind") == [fingerprint("film"), fingerprint(""), fingerprint("book")]
    assert batch.jagged()["tags"].lengths().tolist() == [2, 0, 0]
    assert values(batch, "history") == [fingerprint("b"), fingerprint("a")]
    assert values(batch, "kinds") == [fingerprint("film"), fingerprint("book")]
    assert batch.dense_user.tolist() == [[0.0]]


def test_item_features_of_a_request_override_the_catalogue(prepared: Any) -> None:
    request = ScoreRequest(
        user={},
        history={},
        items=["b", "a", "new"],
        item_features={"kind": [None, "game", "song"], "tags": [["z"], "p|q", None], "price": [None, 10.0, 10.0]},
    )
    batch = prepared.encoder.encode_request(request, prepared.catalogue)
    assert values(batch, "kind") == [fingerprint("film"), fingerprint("game"), fingerprint("song")]
    assert values(batch, "tags") == [fingerprint(t) for t in "zpq"]
    assert batch.jagged()["tags"].lengths().tolist() == [1, 2, 0]
    assert batch.dense_item[0] == batch.dense_item[1] == batch.dense_item[2]
    assert values(batch, "history") == []


def test_item_features_of_the_wrong_length_are_refused(prepared: Any) -> None:
    request = ScoreRequest(user={}, history={}, items=["a", "b"], item_features={"kind": ["film"]})
    with pytest.raises(SchemaError, match=r"item_features\.kind has 1 values for 2 items"):
        prepared.encoder.encode_request(request, prepared.catalogue)


def test_item_ids_under_the_item_column_feed_every_sequence(prepared: Any) -> None:
    request = ScoreRequest(user={}, history={"item": ["a", "new", "b"]}, items=["a"])
    batch = prepared.encoder.encode_request(request, prepared.catalogue)
    assert values(batch, "history") == [fingerprint("a"), fingerprint("new")]
    assert values(batch, "kinds") == [fingerprint("book"), fingerprint("")]


def test_rows_of_the_catalogue_save_the_look_up(prepared: Any) -> None:
    request = ScoreRequest(user={}, history={}, items=["a", "b"])
    rows = prepared.catalogue.rows(["a", "b"])
    with_rows = prepared.encoder.encode_request(request, prepared.catalogue, rows)
    without = prepared.encoder.encode_request(request, prepared.catalogue)
    assert torch.equal(with_rows.ids.values(), without.ids.values())


def test_no_candidates_and_no_history_are_an_empty_batch(prepared: Any) -> None:
    batch = prepared.encoder.encode_request(ScoreRequest(user={}, history={}, items=[]), prepared.catalogue)
    assert (batch.users, batch.targets) == (1, 0)
    assert values(batch, "item") == []
