"""What a row may see of its user's past, against a reference that looks at every earlier row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.data.history import build_histories
from engine.data.order import sort_by_time
from engine.data.store import Store
from engine.errors import DataError, SchemaError
from engine.hashing import fingerprint

World = Callable[..., Any]
FEATURES = [
    {"name": "user", "side": "user"},
    {"name": "item"},
    {"name": "history", "kind": "sequence", "of": "item", "max_length": 3},
]


def lists(batch: Batch, feature: str) -> list[list[int]]:
    jagged = batch.jagged()[feature]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def naive(log: list[tuple[int, int, int, int]], longest: int) -> list[list[int]]:
    """Rows (user, item, time, label), row by row: the row numbers of what each may see, newest first."""
    seen = []
    for user, _, time, _ in log:
        past = [(t, i, n) for n, (u, i, t, label) in enumerate(log) if u == user and t < time and label]
        seen.append([n for _, _, n in sorted(past, key=lambda p: (p[0], p[1], p[2]))[::-1]][:longest])
    return seen


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-2, 6), st.integers(0, 1)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=ROWS, limit=st.sampled_from([2, 5, 1000]), longest=st.integers(1, 4))
def test_histories_are_the_earlier_positives_newest_first_in_any_number_of_buckets(
    tmp_path: Path, log: list[tuple[int, int, int, int]], limit: int, longest: int
) -> None:
    store = _store(tmp_path, log)
    item_rank = np.array([0, 1, 2, 3, 4, -1])
    build_histories(store, 4, item_rank, longest, limit)
    past = store["past"]
    start, length = store["past_start"], store["past_length"]
    found = [past[s : s + n].tolist() for s, n in zip(start, length, strict=True)]
    assert found == naive(log, longest)
    for user in range(4):
        begin, end = store["user_rows"][user]
        mine = sorted((n for n, row in enumerate(log) if row[0] == user), key=lambda n: (log[n][2], log[n][1], n))
        assert store["by_user"][begin:end].tolist() == mine
        begin, end = store["user_past"][user]
        assert past[begin:end].tolist() == [n for n in mine if log[n][3]][::-1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=ROWS, limit=st.sampled_from([2, 5, 1000]))
def test_the_order_of_time_is_the_same_sorted_whole_or_in_buckets(
    tmp_path: Path, log: list[tuple[int, int, int, int]], limit: int
) -> None:
    store = _store(tmp_path, log)
    ranks = np.array([0, 1, 2, 3, 4, -1])
    sort_by_time(store, ranks, ranks, limit)
    expected = sorted(range(len(log)), key=lambda n: (log[n][2], log[n][0], log[n][1], n))
    assert store["order"].tolist() == expected


def _store(folder: Path, log: list[tuple[int, int, int, int]]) -> Store:
    store = Store(folder)
    columns = np.array(log)
    for name, dtype, values in (
        ("user", "i4", columns[:, 0]),
        ("item", "i4", columns[:, 1]),
        ("time", "i8", columns[:, 2]),
        ("labels", "f4", columns[:, 3:]),
    ):
        store.create(name, dtype, values.shape)[:] = values
    return store


def test_what_was_shown_together_does_not_explain_itself(world: World) -> None:
    """Two clicks at time 5 are one page: neither sees the other, the row at time 6 sees both, newest first."""
    log = {
        "user": ["u", "u", "u", "u"],
        "item": ["a", "b", "c", "d"],
        "time": [1, 5, 5, 6],
        "label": [1, 1, 1, 0],
    }
    batch = next(world(log, FEATURES).batches("train", 10))
    a, b, c = (fingerprint(x) for x in "abc")
    assert lists(batch, "history") == [[], [a], [a], [c, b, a]]


def test_a_test_row_sees_the_test_positives_before_it(world: World) -> None:
    log = {"user": ["u"] * 4, "item": list("abcd"), "time": [1, 2, 3, 4], "label": [1, 1, 1, 1]}
    prepared = world(log, FEATURES, split={"by": "time", "validation": 0, "test": 0.5})
    batch = next(prepared.batches("test", 10))
    a, b, c = (fingerprint(x) for x in "abc")
    assert lists(batch, "history") == [[b, a], [c, b, a]]


def test_the_files_need_no_order(world: World) -> None:
    log = {"user": ["u"] * 3, "item": list("cab"), "time": [3, 1, 2], "label": [0, 1, 1]}
    batch = next(world(log, FEATURES).batches("train", 10))
    assert batch.time is not None
    assert batch.time.tolist() == [1, 2, 3]
    assert lists(batch, "history") == [[], [fingerprint("a")], [fingerprint("b"), fingerprint("a")]]


def test_aligned_sequences_list_the_same_events(world: World) -> None:
    """An item's kind comes from the attributes, the device from the row in which it was liked."""
    features = [
        *FEATURES,
        {"name": "kind"},
        {"name": "device", "side": "context"},
        {"name": "kinds", "kind": "sequence", "of": "kind", "max_length": 3},
        {"name": "devices", "kind": "sequence", "of": "device", "max_length": 3},
    ]
    log = {
        "user": ["u"] * 3,
        "item": ["a", "x", "a"],
        "time": [1, 2, 3],
        "label": [1, 1, 0],
        "device": ["phone", "desk", "tv"],
    }
    prepared = world(log, features, items={"item": ["a"], "kind": ["film"]})
    batch = next(prepared.batches("train", 10))
    assert lists(batch, "history")[2] == [fingerprint("x"), fingerprint("a")]
    assert lists(batch, "kinds")[2] == [fingerprint(""), fingerprint("film")]
    assert lists(batch, "devices")[2] == [fingerprint("desk"), fingerprint("phone")]


def test_rows_without_a_user_have_no_history(world: World) -> None:
    log = {"user": [None, None, "u"], "item": list("abc"), "time": [1, 2, 3], "label": [1, 1, 1]}
    prepared = world(log, FEATURES)
    assert lists(next(prepared.batches("train", 10)), "history") == [[], [], []]
    assert [state.user for state in prepared.users()] == ["u"]


def test_without_times_the_order_of_the_rows_is_time(world: World) -> None:
    log = {"user": ["u"] * 3, "item": list("abc"), "label": [1, 0, 1]}
    batch = next(world(log, FEATURES, time=None).batches("train", 10))
    assert lists(batch, "history") == [[], [fingerprint("a")], [fingerprint("a")]]
    assert batch.time is None


def test_a_given_history_is_taken_as_it_is(world: World) -> None:
    log = {
        "user": ["u", "u", "v"],
        "item": list("abc"),
        "time": [1, 2, 3],
        "label": [1, 1, 1],
        "history": ["x|y|z|w", None, ""],
    }
    batch = next(world(log, FEATURES).batches("train", 10))
    assert lists(batch, "history") == [[fingerprint(c) for c in "xyz"], [], []]


def test_given_sequences_of_different_lengths_are_refused(world: World) -> None:
    features = [*FEATURES, {"name": "times", "kind": "sequence", "max_length": 3}]
    log = {"user": ["u"], "item": ["a"], "time": [1], "label": [1], "history": ["x|y"], "times": ["1"]}
    with pytest.raises(DataError, match="different lengths"):
        world(log, features)


def test_a_sequence_that_nothing_can_feed_says_so(world: World) -> None:
    log = {"user": ["u"], "item": ["a"], "time": [1], "label": [1]}
    with pytest.raises(SchemaError, match=r"features\.history\.of: no feature 'itm'; did you mean 'item'"):
        world(log, [*FEATURES[:2], {"name": "history", "kind": "sequence", "of": "itm"}])
    with pytest.raises(SchemaError, match=r"a history needs data\.user"):
        world(log, FEATURES[1:], user=None)


def test_a_users_state_lists_positives_and_everything_seen_newest_first(world: World) -> None:
    log = {
        "user": ["u", "v", "u", "u", "u"],
        "item": ["a", "a", "b", "c", "a"],
        "time": [1, 1, 2, 3, 4],
        "label": [1, 0, 1, 0, 1],
    }
    users = {"user": ["w", "u"], "age": [30, 40]}
    states = {s.user: s for s in world(log, [*FEATURES, {"name": "age", "side": "user"}], users=users).users()}
    assert states["u"].history == ["a", "b", "a"]
    assert states["u"].times == [4, 2, 1]
    assert states["u"].seen == ["a", "c", "b"]
    assert states["u"].features == {"user": "u", "age": 40}
    assert (states["v"].history, states["v"].seen, states["v"].features["age"]) == ([], ["a"], None)
    assert (states["w"].history, states["w"].seen) == ([], [])


def test_items_without_an_id_are_in_no_state(world: World) -> None:
    log = {"user": ["u"] * 3, "item": ["a", None, "b"], "time": [1, 2, 3], "label": [1, 1, 1]}
    (state,) = world(log, FEATURES).users()
    assert (state.history, state.times, state.seen) == (["b", "a"], [3, 1], ["b", "a"])
