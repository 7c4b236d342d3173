"""Each part of the pipeline fails in each way; the request is answered in time and says what it lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.candidates import Merged
from engine.components import Candidates, Scores, UserState
from engine.deadline import Deadline
from engine.errors import RequestError, SchemaError
from engine.pipeline import Pipeline, Query
from engine.served import Served

ITEMS = [str(n) for n in range(30)]


class FakeScorer:
    """Scores an item by its number; `act` runs first and may raise, sleep or give another answer."""

    name = "fake"

    def __init__(self) -> None:
        self.act: Any = None
        self.requests: list[Any] = []

    def score(self, request: Any) -> Scores:
        self.requests.append(request)
        if self.act is not None:
            given = self.act(request)
            if given is not None:
                return Scores({"liked": given}, "fake", "1")
        return Scores({"liked": np.array([int(i) / 100 for i in request.items], np.float32)}, "fake", "1")


class FakeStore:
    def __init__(self) -> None:
        self.act: Any = None
        self.state = UserState("u", {}, ["3", "4"], [2, 1], ["3", "4"])

    def get(self, user: str) -> UserState:
        if self.act is not None:
            self.act()
        s = self.state
        return UserState(user, dict(s.features), list(s.history), list(s.times), list(s.seen))


class FakeSource:
    def __init__(self, rows: list[int]) -> None:
        self.act: Any = None
        self.rows = np.array(rows)

    def candidates(self, user: Any, request: Any, k: int) -> Any:
        if self.act is not None:
            given = self.act()
            if given is not None:
                return given
        return Candidates(self.rows[:k], np.ones(len(self.rows[:k]), np.float32))


class FakeReranker:
    def __init__(self) -> None:
        self.act: Any = None

    def rerank(self, rows: np.ndarray, scores: np.ndarray, k: int) -> Any:
        if self.act is not None:
            return self.act(rows, k)
        return np.arange(len(rows))[::-1][:k], {0: "turned round"}


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, plugins: Any) -> Served:
    return Served.open(tiny_bundle, None, plugins)


@pytest.fixture
def world(served: Served, plugins: Any) -> Iterator[Any]:
    """A pipeline of fakes over the catalogue of the tiny bundle (30 items, row n is item n)."""
    scorer, store = FakeScorer(), FakeStore()
    near, far, reranker = FakeSource([1, 2, 3, 5]), FakeSource([9, 8, 5]), FakeReranker()
    one = Served(
        served.bundle,
        served.context,
        (("near", 10, near), ("far", 10, far)),  # type: ignore[arg-type]
        (),
        served.popular,
    )
    pipeline = Pipeline(one, scorer, store, plugins)  # type: ignore[arg-type]
    stall.begin()
    yield SimpleNamespace(
        pipeline=pipeline, scorer=scorer, store=store, near=near, far=far, reranker=reranker, served=one
    )
    stall.gate.set()
    pipeline.close()


def query(seconds: float = 5.0, **changes: Any) -> Query:
    return Query("r", Deadline(seconds), **({"user": "u"} | changes))


def fail(*_: Any) -> None:
    raise ConnectionError("down")


class Stalled:
    """Does not come back before the test has its answer; `inside`: how many such calls there are now."""

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self.begin()

    def begin(self) -> None:
        self.gate, self.inside = threading.Event(), 0

    def __call__(self, *_: Any) -> None:
        gate = self.gate
        with self._counting:
            self.inside += 1
        if not gate.wait(20):
            with self._counting:
                self.inside -= 1


stall = Stalled()


def popular(served: Served) -> list[str]:
    """Items by positives, counted from the bundle's own figures."""
    counts = dict(zip(served.catalogue.ids(np.arange(30)), served.bundle.item_counts.tolist(), strict=True))
    return sorted(ITEMS, key=lambda item: (-counts[item], int(item)))


def test_when_all_goes_well_nothing_is_degraded(world: Any) -> None:
    answer = world.pipeline.recommend(query(), 10)
    assert answer.items == ["9", "8", "5", "2", "1"]  # by number; 3 was seen
    assert answer.degraded == []
    assert answer.trace.sources == [["far"], ["far"], ["near", "far"], ["near"], ["near"]]


# ---------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize(("act", "why"), [(fail, "ConnectionError"), (stall, "deadline")])
def test_without_the_store_the_user_has_no_history(world: Any, act: Any, why: str) -> None:
    world.store.act = act
    answer = world.pipeline.recommend(query(0.4), 10)
    assert stall.inside == (act is stall), "the answer is there and the store is not"
    assert answer.degraded == [f"state: {why}"]
    assert answer.items == ["9", "8", "5", "3", "2", "1"], "what was seen is not known"
    assert world.scorer.requests[-1].history == {"item_id": []}


def test_stored_features_that_no_longer_fit_are_left_out(world: Any) -> None:
    world.store.state.features = {"year": "abc"}

    def pedantic(request: Any) -> None:
        if "year" in request.user:
            raise SchemaError("year: 'abc' is not a number")

    world.scorer.act = pedantic
    answer = world.pipeline.rank(query(), ["1", "2"], {})
    assert answer.items == ["2", "1"]
    assert answer.degraded == ["state: stored features do not fit the model"]


# -------------------------------------------------------------------------------------------------- retrieve
@pytest.mark.parametrize(
    ("act", "why"),
    [
        (fail, "ConnectionError"),
        (stall, "deadline"),
        (lambda: Candidates(np.array([999]), np.array([1.0])), "wrong answer"),
        (lambda: [1, 2], "wrong answer"),
    ],
)
def test_a_source_that_fails_costs_its_candidates(world: Any, act: Any, why: str) -> None:
    world.near.act = act
    answer = world.pipeline.recommend(query(0.5), 10)
    assert answer.degraded == [f"retrieve.near: {why}"]
    assert answer.items == ["9", "8", "5"]


def test_without_any_source_the_popular_items_are_ranked(world: Any) -> None:
    world.near.act = world.far.act = fail
    answer = world.pipeline.recommend(query(), 30)
    assert answer.degraded == [
        "retrieve.near: ConnectionError",
        "retrieve.far: ConnectionError",
        "retrieve: popularity in place of all sources",
    ]
    assert answer.items == [item for item in reversed(ITEMS) if item not in ("3", "4")]
    assert answer.trace.sources[0] == ["popularity"]


# ----------------------------------------------------------------------------------------------------- rank
@pytest.mark.parametrize(
    ("act", "why"),
    [
        (fail, "ConnectionError"),
        (stall, "deadline"),
        (lambda r: np.full(len(r.items), np.nan, np.float32), "scores are not finite"),
        (lambda r: np.zeros(1, np.float32), "scores are not finite"),
    ],
)
def test_without_the_scorer_the_order_is_the_sources_or_popularity(
    world: Any, served: Served, act: Any, why: str
) -> None:
    world.scorer.act = act
    recommended = world.pipeline.recommend(query(0.4), 10)
    ranked = world.pipeline.rank(query(0.4), [*ITEMS, "unknown"], {})
    assert bool(stall.inside) == (act is stall), "the answers are there and the scores are not"
    assert recommended.degraded == ranked.degraded == [f"rank: {why}"]
    assert recommended.items == ["1", "9", "2", "8", "5"], "the sources' best in turns"
    assert ranked.items == [*popular(served), "unknown"]
    assert np.isfinite(ranked.scores).all()


def test_one_slow_scoring_does_not_make_the_others_wrong(world: Any) -> None:
    release = threading.Event()
    world.scorer.act = lambda request: release.wait(5) and None if len(request.items) == 1 else None
    slow = world.pipeline.begin(world.pipeline.ranking(query(0.3), ["7"], {}))
    answer = world.pipeline.rank(query(0.3), ["1", "2"], {})  # the one scoring place is taken
    assert answer.degraded == ["rank: deadline"]
    assert slow.result(5).degraded == ["rank: deadline"]
    release.set()
    time.sleep(0.1)
    assert world.pipeline.rank(query(), ["1", "2"], {}).degraded == []


def test_what_the_request_brings_that_cannot_be_read_is_its_own_fault(world: Any) -> None:
    def refuse(_: Any) -> None:
        raise SchemaError("year: 'x' is not a number")

    world.scorer.act = refuse
    with pytest.raises(RequestError, match="not a number"):
        world.pipeline.rank(query(), ["1"], {"year": ["x"]})


# --------------------------------------------------------------------------------------------------- rerank
def reranked(world: Any) -> Any:
    one = world.served
    world.pipeline.swap(Served(one.bundle, one.context, one.sources, (("turn", world.reranker),), one.popular))
    return world.pipeline.recommend(query(0.4), 3)


def test_a_reranker_has_the_last_word(world: Any) -> None:
    answer = reranked(world)
    assert answer.items == ["1", "2", "5"]
    assert answer.degraded == []
    assert answer.trace.rules == [[], [], []]  # the rule was for the item that fell out


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (fail, "ConnectionError"),
        (stall, "deadline"),
        (lambda rows, k: (np.array([0, 0]), {}), "ValueError"),
        (lambda rows, k: (np.array([99]), {}), "ValueError"),
        (lambda rows, k: (np.array([0.5]), {}), "ValueError"),
        (lambda rows, k: None, "TypeError"),
        (lambda rows, k: (np.array([0]), {77: "rule of nothing"}), "IndexError"),
    ],
)
def test_a_reranker_that_fails_is_skipped(world: Any, act: Any, why: str) -> None:
    world.reranker.act = act
    answer = reranked(world)
    assert answer.degraded == [f"rerank.turn: {why}"]
    assert answer.items == ["9", "8", "5"]


# -------------------------------------------------------------------------------------------------- deadline
def test_a_deadline_that_has_passed_gives_the_popular_items_at_once(world: Any, served: Served) -> None:
    world.store.act = world.near.act = world.far.act = stall  # so that "at once" is without any of them
    late = Query("r", Deadline(0.01, begin=time.monotonic() - 1), user="u")
    answer = world.pipeline.recommend(late, 5)
    assert answer.items == popular(served)[:5]
    assert "rank: deadline" in answer.degraded
    assert world.scorer.requests == []


def test_every_part_stalls_at_once_and_still_there_is_an_answer(world: Any, served: Served) -> None:
    world.store.act = world.near.act = world.far.act = world.scorer.act = stall
    answer = world.pipeline.recommend(query(0.3), 5)
    assert stall.inside >= 3, "the store, two sources, and the scorer if its place was free"
    assert answer.items == popular(served)[:5]
    assert [reason.partition(":")[0] for reason in answer.degraded] == [
        "state",
        "retrieve.near",
        "retrieve.far",
        "retrieve",
        "rank",
    ]


def test_an_empty_merge_is_an_empty_answer(world: Any) -> None:
    answer = world.pipeline.recommend(query(), 5, exclude=ITEMS)
    assert answer.items == []
    assert answer.degraded == []
    assert len(Merged(np.array([1]), np.array([1.0]), np.array([1], np.uint64)).take(np.array([], np.int64)).rows) == 0
