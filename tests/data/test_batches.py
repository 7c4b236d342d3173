"""Batches: what is in them, in which order, on which process, and from which thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.background import ahead
from engine.data.shuffle import Permutation
from engine.errors import DataError, SchemaError
from engine.hashing import fingerprint

ANY_SPEED = settings(deadline=None)  # a loaded machine is no failure

World = Callable[..., Any]
FEATURES = [
    {"name": "user", "side": "user"},
    {"name": "item"},
    {"name": "tags", "kind": "multi"},
    {"name": "price", "kind": "numeric"},
    {"name": "hour", "side": "context", "kind": "numeric"},
    {"name": "hour_bin", "side": "context", "kind": "numeric", "transform": "bins", "bins": 2, "column": "hour"},
    {"name": "history", "kind": "sequence", "of": "item"},
]
ROWS = 23
LOG = {
    "user": [f"u{n % 4}" for n in range(ROWS)],
    "item": [n % 5 for n in range(ROWS)],
    "time": list(range(ROWS)),
    "label": [n % 3 == 0 for n in range(ROWS)],
    "tags": [["", "a", "a|b"][n % 3] for n in range(ROWS)],
    "hour": [None if n == 7 else float(n % 24) for n in range(ROWS)],
}
ITEMS = {"item": list(range(5)), "price": [1.0, 2.0, 3.0, 4.0, 5.0]}


@pytest.fixture
def prepared(world: World) -> Any:
    return world(LOG, FEATURES, items=ITEMS)


def times(batches: Iterator[Any]) -> list[list[int]]:
    return [batch.time.tolist() for batch in batches]


def test_a_batch_holds_each_rows_values(prepared: Any) -> None:
    batch = next(prepared.batches("train", ROWS))
    ids = batch.jagged()
    assert batch.ids.keys() == ["user", "item", "tags", "hour_bin", "history"]
    assert ids["user"].values().tolist() == [fingerprint(u) for u in LOG["user"]]
    assert ids["item"].values().tolist() == [fingerprint(i) for i in LOG["item"]]
    assert ids["tags"].lengths().tolist() == [n % 3 for n in range(ROWS)]
    assert ids["tags"].values().tolist()[:3] == [fingerprint(x) for x in "aab"]
    assert batch.user_of_target.tolist() == list(range(ROWS))
    assert batch.labels["click"].tolist() == [float(x) for x in LOG["label"]]
    assert batch.user_key.tolist() == ids["user"].values().tolist()
    assert batch.item_key.tolist() == ids["item"].values().tolist()


def test_numbers_are_scaled_by_the_training_rows_and_missing_ones_are_the_mean(prepared: Any) -> None:
    batch = next(prepared.batches("train", ROWS))
    price = np.array([1.0 + n % 5 for n in range(ROWS)])
    np.testing.assert_allclose(batch.dense_item[:, 0], (price - price.mean()) / price.std(), rtol=1e-6)
    hour = np.array([n for n in range(ROWS) if n != 7], float)
    expected = [0.0 if n == 7 else (n - hour.mean()) / hour.std() for n in range(ROWS)]
    np.testing.assert_allclose(batch.dense_user[:, 0], expected, rtol=1e-5)
    # two bins meet at the upper median of the 22 hours, which is 12; a missing hour has an id of its own
    bins = [fingerprint("") if n == 7 else fingerprint(int(n >= 12)) for n in range(ROWS)]
    assert batch.jagged()["hour_bin"].values().tolist() == bins


def test_the_order_is_times_or_the_seeds(prepared: Any) -> None:
    assert times(prepared.batches("train", 10)) == [list(range(10)), list(range(10, 20)), [20, 21, 22]]
    once, again = (times(prepared.batches("train", 10, shuffle_seed=3)) for _ in range(2))
    other = times(prepared.batches("train", 10, shuffle_seed=4))
    assert once == again != other
    assert sorted([*chain(*once)]) == sorted([*chain(*other)]) == list(range(ROWS))
    assert [*chain(*once)] != list(range(ROWS))


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_rows_make_up_the_one_process_batch(prepared: Any, seed: int | None, world_size: int) -> None:
    whole = times(prepared.batches("train", 10, shuffle_seed=seed))
    parts = [
        times(prepared.batches("train", 10, shuffle_seed=seed, rank=rank, world=world_size))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert [part[step] for part in parts] == [batch[rank::world_size] for rank in range(world_size)]


def test_a_rank_without_rows_in_the_last_batch_gets_an_empty_one(prepared: Any) -> None:
    """23 rows in batches of 22: the last holds one row, and rank 1 none of it."""
    last = list(prepared.batches("train", 22, rank=1, world=2))[-1]
    assert (last.targets, last.users) == (0, 0)
    assert last.ids.keys() == ["user", "item", "tags", "hour_bin", "history"]


def test_a_later_step_begins_where_an_unbroken_run_would_be(prepared: Any) -> None:
    whole = times(prepared.batches("train", 5, shuffle_seed=1))
    assert times(prepared.batches("train", 5, shuffle_seed=1, start_step=3)) == whole[3:]
    assert prepared.steps("train", 5) == len(whole) == 5


def test_positives_only(prepared: Any) -> None:
    batch = next(prepared.batches("train", 100, positives_only=True))
    assert batch.time.tolist() == [n for n in range(ROWS) if n % 3 == 0]


def test_outcomes_are_labels_and_keys(prepared: Any) -> None:
    ((labels, users, items),) = prepared.outcomes("train")
    assert labels.tolist() == [float(x) for x in LOG["label"]]
    assert users.tolist() == [fingerprint(u) for u in LOG["user"]]
    assert items.tolist() == [fingerprint(i) for i in LOG["item"]]


def test_an_unknown_split_is_named(prepared: Any) -> None:
    with pytest.raises(DataError, match="no split 'dev'; there are train, validation, test"):
        list(prepared.batches("dev", 5))


def test_statistics_count_training_ids_by_space(world: World) -> None:
    """Six rows train, two test. Items' tags count once a row that shows the item; histories do not count."""
    features = [
        {"name": "item"},
        {"name": "tags", "kind": "multi", "space": "word"},
        {"name": "word", "side": "context"},
        {"name": "history", "kind": "sequence", "of": "item"},
    ]
    log = {
        "user": ["u"] * 8,
        "item": list("aabbccdd"),
        "time": list(range(8)),
        "label": [1] * 8,
        "word": ["x", "x", "x", "y", "y", "z", "new", "new"],
    }
    items = {"item": list("abcd"), "tags": ["x|w", "x", "", "late"]}
    prepared = world(log, features, items=items, split={"by": "time", "validation": 0, "test": 0.25})
    assert set(prepared.statistics) == {"item", "word"}
    word = prepared.statistics["word"]
    counts = dict(zip(word.fingerprints.tolist(), word.counts.tolist(), strict=True))
    assert counts == {fingerprint("x"): 3 + 2 + 2, fingerprint("w"): 2, fingerprint("y"): 2, fingerprint("z"): 1}
    item = prepared.statistics["item"]
    assert item.size == 3
    assert (item.fingerprints[:-1] < item.fingerprints[1:]).all()
    asked = torch.tensor([[fingerprint("a"), fingerprint("d")], [item.fingerprints[2].item(), 5]])
    rows = item.rows(asked)
    assert rows.shape == (2, 2)
    assert item.fingerprints[rows[0, 0]] == fingerprint("a")
    assert rows[0, 1] == rows[1, 1] == -1
    assert rows[1, 0] == 2
    assert prepared.item_counts.tolist() == [2, 2, 2, 0]
    assert prepared.item_latest.tolist() == [1, 3, 5, 7]


def test_the_newest_value_of_the_log_feeds_the_catalogue(world: World) -> None:
    """The items' table knows no price: training sees each row's, the catalogue keeps the last."""
    features = [{"name": "item"}, {"name": "price", "kind": "numeric"}, {"name": "mood", "side": "user"}]
    log = {
        "user": ["u", "v", "u"],
        "item": ["a", "b", "a"],
        "time": [1, 2, 3],
        "label": [1, 0, 1],
        "price": [1.0, 2.0, 3.0],
        "mood": ["glad", "sad", "mad"],
    }
    prepared = world(log, features, items={"item": ["b", "z"], "title": ["B", "Z"]}, title="title")
    catalogue = prepared.catalogue
    assert catalogue.ids(np.arange(3)) == ["b", "z", "a"]
    assert catalogue.column("price").to_pylist() == [2.0, None, 3.0]
    assert catalogue.column("title").to_pylist() == ["B", "Z", None]
    assert [catalogue.title(row) for row in range(3)] == ["B", "Z", "a"]
    assert {state.user: state.features["mood"] for state in prepared.users()} == {"u": "mad", "v": "sad"}
    batch = next(prepared.batches("train", 3))
    scale = np.array([1.0, 2.0, 3.0]).std()
    np.testing.assert_allclose(batch.dense_item[:, 0], [-1 / scale, 0, 1 / scale], rtol=1e-6)


def test_data_without_users_items_and_times(world: World) -> None:
    features = [{"name": "site"}, {"name": "count", "kind": "numeric"}]
    log = {"site": ["a", "b"], "count": [1, 3], "label": [0, 1]}
    prepared = world(log, features, user=None, item=None, time=None)
    batch = next(prepared.batches("train", 2))
    assert (batch.user_key, batch.item_key, batch.time) == (None, None, None)
    assert batch.dense_item.tolist() == [[-1.0], [1.0]]
    assert len(prepared.catalogue) == 0
    assert list(prepared.users()) == []


@pytest.mark.parametrize(
    ("label", "message"),
    [([0, 2], "holds 0..2, not 0..1; set at_least"), ([0, None], "empty or not finite"), (["a", "b"], "not hold num")],
)
def test_labels_that_are_none_are_refused(world: World, label: list[Any], message: str) -> None:
    log = {"user": ["u", "u"], "item": ["a", "b"], "time": [1, 2], "label": label}
    with pytest.raises(DataError, match=message):
        world(log, FEATURES[:2])


@pytest.mark.parametrize(("time", "message"), [([1, None], "empty in 1 rows"), (["soon", "late"], "not hold times")])
def test_times_that_are_none_are_refused(world: World, time: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        world({"user": ["u", "u"], "item": ["a", "b"], "time": time, "label": [0, 1]}, FEATURES[:2])


def test_no_rows_at_all_are_refused(world: World) -> None:
    with pytest.raises(DataError, match="no rows"):
        world({"user": [], "item": [], "time": [], "label": []}, FEATURES[:2])


def test_a_feature_without_a_column_names_the_nearest(world: World) -> None:
    log = {"user": ["u"], "item": ["a"], "time": [1], "label": [1]}
    with pytest.raises(SchemaError, match=r"features\[\d\]\.column: no column 'itemm' .* did you mean 'item'"):
        world(log, [{"name": "itemm"}])


# ------------------------------------------------------------------------------------ shuffles and the thread
@ANY_SPEED
@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_a_shuffle_is_a_permutation_that_can_be_asked_anywhere(rows: int, seed: int) -> None:
    shuffle = Permutation(rows, seed)
    whole = shuffle(np.arange(rows))
    assert sorted(whole.tolist()) == list(range(rows))
    assert int(shuffle(np.array([rows // 2]))[0]) == whole[rows // 2]


def test_a_shuffle_leaves_no_trace_of_the_order() -> None:
    """Neighbours of 100,000 rows are uncorrelated after it: |r| < 4 / sqrt(n), and the halves mix."""
    rows = 100_000
    whole = Permutation(rows, 7)(np.arange(rows))
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 4 / np.sqrt(rows)
    assert abs(np.mean(whole[: rows // 2] < rows // 2) - 0.5) < 4 * 0.5 / np.sqrt(rows)


def test_what_the_thread_raises_reaches_the_consumer_in_its_place() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("row 3 is torn")

    batches = ahead(broken())
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match="row 3 is torn"):
        next(batches)


def test_the_thread_stops_when_its_consumer_does_and_never_runs_far_ahead() -> None:
    made: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    batches = ahead(endless(), depth=3)
    assert [next(batches) for _ in range(2)] == [0, 1]
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "plexrank-batches"]
    assert len(made) <= 2 + 3 + 1 + 1
