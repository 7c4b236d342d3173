"""Candidate sources propose, rerankers choose: each against an order worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from engine.candidates import merge, wrong_candidates
from engine.catalogue import ArrowCatalogue
from engine.components import Candidates, SourceContext, UserState
from engine.errors import PluginError
from plugins.rerank.attributes import read_attribute
from plugins.rerank.cap import CapReranker
from plugins.rerank.mmr import MmrReranker
from plugins.sources.popular import PopularSource
from plugins.sources.recent import RecentSource
from plugins.sources.retriever import RetrieverSource

USER = UserState("u")


def context(**changes: Any) -> SourceContext:
    """Six items a..f; genres in three spellings."""
    table = pa.table(
        {
            "item_id": list("abcdef"),
            "genre": ["x", "x", "x", "y", "y", None],
            "tags": ["x|y", "x", "y", "z", "x|z", ""],
            "list": [["x", "y"], ["x"], ["y"], ["z"], ["x", "z"], None],
            "coded": pa.array(["x", "x", "y", "y", "z", "z"]).dictionary_encode(),
            "year": [1990, 1990, 1991, 1992, 1990, None],
        }
    )
    fields: dict[str, Any] = {
        "catalogue": ArrowCatalogue(table, "item_id"),
        "counts": np.array([5, 0, 9, 9, 1, 0]),
        "latest": np.array([100, 0, 300, 200, 0, 400]),
    }
    return SourceContext(**(fields | changes))


# ------------------------------------------------------------------------------------------------- sources
def test_popular_goes_by_positives_then_by_row_and_fills_up() -> None:
    found = PopularSource(PopularSource.Options(), context()).candidates(USER, {}, 6)
    assert found.rows.tolist() == [2, 3, 0, 4, 1, 5]
    assert found.scores.tolist() == pytest.approx(np.log1p([9, 9, 5, 1, 0, 0]))


def test_recent_goes_by_the_newest_event_and_leaves_out_items_without_one() -> None:
    found = RecentSource(RecentSource.Options(), context()).candidates(USER, {}, 10)
    assert found.rows.tolist() == [5, 2, 3, 0]
    assert found.scores.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", [PopularSource, RecentSource])
def test_a_source_that_grows_proposes_what_one_made_anew_would(kind: type[PopularSource] | type[RecentSource]) -> None:
    """Item by item and many at once, equal times among them; those before go on with what they began with."""
    rng = np.random.default_rng(3)
    before = source = kind(kind.Options(), context())
    first = before.candidates(USER, {}, 9)
    counts, latest = source.context.counts, source.context.latest
    for came in (1, 0, 2, 1, 2000, 3):
        counts = np.concatenate([counts, np.zeros(came, np.int64)])
        latest = np.concatenate([latest, rng.integers(0, 500, came)])
        source = source.grown(context(counts=counts, latest=latest))
        for k in (1, 4, 10_000):
            mine = source.candidates(USER, {}, k)
            wanted = kind(kind.Options(), context(counts=counts, latest=latest)).candidates(USER, {}, k)
            assert mine.rows.tolist() == wanted.rows.tolist()
            np.testing.assert_array_equal(mine.scores, wanted.scores)
            assert mine.rows.dtype == np.int64
            assert mine.scores.dtype == np.float32
    assert before.candidates(USER, {}, 9).rows.tolist() == first.rows.tolist()
    source = source.grown(context(counts=np.append(counts, 10), latest=np.append(latest, 0)))
    if kind is PopularSource:
        assert source.candidates(USER, {}, 1).rows.tolist() == [len(counts)]


def test_a_world_without_events_has_no_recent_items() -> None:
    source = RecentSource(RecentSource.Options(), context(latest=np.zeros(6, dtype=np.int64)))
    assert len(source.candidates(USER, {}, 10).rows) == 0


@pytest.mark.parametrize("source", [PopularSource, RecentSource])
def test_no_more_than_k_are_proposed(source: type[Any]) -> None:
    for k in (1, 3):
        assert len(source(source.Options(), context()).candidates(USER, {}, k).rows) == k


class ThreeNearest:
    """A retriever that knows three items."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        assert queries.shape == (1, 2)
        assert k == 6, "never more than the catalogue has"
        rows = np.array([[4, 0, 2, -1, -1, -1]])
        return rows, np.array([[0.9, 0.5, 0.1, -np.inf, -np.inf, -np.inf]], dtype=np.float32)


def test_the_retriever_source_asks_with_the_users_vector_and_drops_the_empty_places() -> None:
    asked: list[Any] = []

    def encode(user: UserState, request: Any) -> np.ndarray:
        asked.append((user, request))
        return np.array([1.0, 2.0])

    source = RetrieverSource(RetrieverSource.Options(), context(retriever=ThreeNearest(), encode_user=encode))
    found = source.candidates(USER, {"context": {"hour": 3}}, 50)
    assert found.rows.tolist() == [4, 0, 2]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert asked == [(USER, {"context": {"hour": 3}})]


def test_the_retriever_source_without_an_encoder_says_what_to_do() -> None:
    with pytest.raises(PluginError, match="add a section 'retrieval'"):
        RetrieverSource(RetrieverSource.Options(), context())


# --------------------------------------------------------------------------------------------------- merge
def candidates(*rows: int) -> Candidates:
    return Candidates(np.array(rows, dtype=np.int64), np.linspace(1, 0, len(rows), dtype=np.float32))


def test_sources_are_merged_in_turns_and_an_item_keeps_all_who_proposed_it() -> None:
    merged = merge([(0, candidates(10, 11, 12)), (2, candidates(20, 11, 21, 10))], 100)
    assert merged.rows.tolist() == [10, 20, 11, 12, 21]
    assert merged.fallback.tolist() == pytest.approx([1, 1, 1 / 2, 1 / 3, 1 / 3])
    names = ["near", "unused", "popular"]
    assert [merged.named(n, names) for n in range(5)] == [
        ["near", "popular"],
        ["popular"],
        ["near", "popular"],
        ["near"],
        ["popular"],
    ]


def test_a_merge_is_limited_and_may_be_empty() -> None:
    assert merge([(0, candidates(5, 6, 7))], 2).rows.tolist() == [5, 6]
    assert merge([], 10).rows.tolist() == []
    assert merge([(0, candidates())], 10).rows.tolist() == []


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([1, 2], "answered list"),
        (Candidates(np.array([1, 2]), np.array([0.5])), "of shape"),
        (Candidates(np.array([1.0]), np.array([0.5])), "rows float64"),
        (Candidates(np.array([6]), np.array([0.5])), "outside the catalogue"),
        (Candidates(np.array([-1]), np.array([0.5])), "outside the catalogue"),
        (Candidates(np.array([1]), np.array([np.nan])), "not finite"),
    ],
)
def test_a_wrong_answer_of_a_source_is_recognised(found: Any, why: str) -> None:
    assert why in (wrong_candidates(found, 6) or "")
    assert wrong_candidates(candidates(0, 5), 6) is None


# ----------------------------------------------------------------------------------------------- attributes
@pytest.mark.parametrize("name", ["tags", "list"])
def test_an_attribute_may_be_a_list_or_a_separated_string(name: str) -> None:
    attribute = read_attribute(context().catalogue, name, "|")
    hot = attribute.one_hot(np.array([0, 1, 4, -1]))
    assert hot.sum(axis=1).tolist() == [2, 1, 2, 0]
    assert attribute.one_hot(np.array([5])).sum() == 0
    assert (hot[0] @ hot[1], hot[1] @ hot[2], hot[0] @ hot[2]) == (1, 1, 1)


def test_dictionary_and_number_columns_are_attributes_too() -> None:
    coded = read_attribute(context().catalogue, "coded", "|").one_hot(np.arange(6))
    assert (coded @ coded.T)[0].tolist() == [1, 1, 0, 0, 0, 0]
    year = read_attribute(context().catalogue, "year", "|").one_hot(np.arange(6))
    assert (year @ year.T)[0].tolist() == [1, 1, 0, 0, 1, 0]


def test_an_attribute_that_the_catalogue_lacks_is_named() -> None:
    with pytest.raises(PluginError, match="no attribute 'brand'"):
        CapReranker(CapReranker.Options(attribute="brand"), context())


# ----------------------------------------------------------------------------------------------------- cap
def rerank(reranker: Any, rows: list[int], k: int, scores: list[float] | None = None) -> tuple[list[int], Any]:
    given = np.array(scores if scores is not None else np.linspace(1, 0.1, len(rows)), dtype=np.float32)
    order, rules = reranker.rerank(np.array(rows, dtype=np.int64), given, k)
    return order.tolist(), rules


def test_at_most_n_of_one_value_are_kept() -> None:
    cap = CapReranker(CapReranker.Options(attribute="genre", n=1), context())
    order, rules = rerank(cap, [0, 1, 2, 3, 4, 5, -1], 10)
    assert order == [0, 3, 5, 6], "one x, one y, and the two that have no genre"
    assert rules == dict.fromkeys((3, 5, 6), "cap: at most 1 per genre")


def test_an_item_counts_against_each_of_its_values() -> None:
    cap = CapReranker(CapReranker.Options(attribute="tags", n=1), context())
    # a takes x and y; b (x), c (y) and e (x, z) are full; d (z) is free; f has none
    assert rerank(cap, [0, 1, 2, 4, 3, 5], 10)[0] == [0, 4, 5]


def test_the_cap_stops_at_k_and_takes_nothing_from_nothing() -> None:
    cap = CapReranker(CapReranker.Options(attribute="genre", n=2), context())
    assert rerank(cap, [0, 1, 2, 3], 3)[0] == [0, 1, 3]
    assert rerank(cap, [], 3) == ([], {})


# ----------------------------------------------------------------------------------------------------- mmr
VECTORS = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0, -1]], dtype=np.float32)


def test_mmr_passes_over_a_copy_for_something_else() -> None:
    mmr = MmrReranker(MmrReranker.Options(trade=0.5), context(vectors=VECTORS))
    order, rules = rerank(mmr, [0, 1, 2], 3, [1.0, 0.9, 0.5])
    # scaled scores 1, .8, 0; after a: b = .5*.8 - .5*1 = -.1, c = 0 - 0 = 0
    assert order == [0, 2, 1]
    assert rules == {2: "mmr: raised for variety to place 2"}


def test_mmr_agrees_with_the_definition_computed_item_by_item() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 5)).astype(np.float32) * rng.uniform(0.1, 9, size=(40, 1))
    scores = np.sort(rng.random(40))[::-1].astype(np.float32)
    table = pa.table({"item_id": [str(n) for n in range(40)]})
    where = context(
        catalogue=ArrowCatalogue(table, "item_id"), counts=np.zeros(40), latest=np.zeros(40), vectors=vectors
    )
    mmr = MmrReranker(MmrReranker.Options(trade=0.6), where)
    rows = rng.permutation(40)
    unit = vectors[rows] / np.linalg.norm(vectors[rows], axis=1, keepdims=True)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    taken: list[int] = []
    while len(taken) < 15:
        value = [
            -np.inf if n in taken else 0.6 * scaled[n] - 0.4 * max([0.0, *(float(unit[n] @ unit[m]) for m in taken)])
            for n in range(40)
        ]
        taken.append(int(np.argmax(value)))
    order, _ = mmr.rerank(rows, scores, 15)
    assert order.tolist() == taken


def test_trade_one_keeps_the_order_and_zero_ignores_the_scores() -> None:
    where = context(vectors=VECTORS)
    assert rerank(MmrReranker(MmrReranker.Options(trade=1), where), [3, 1, 0, 2], 4) == ([0, 1, 2, 3], {})
    assert rerank(MmrReranker(MmrReranker.Options(trade=0), where), [0, 1, 4], 2)[0] == [0, 2]


def test_mmr_takes_an_attribute_where_there_is_no_encoder() -> None:
    with pytest.raises(PluginError, match="name an attribute"):
        MmrReranker(MmrReranker.Options(), context())
    mmr = MmrReranker(MmrReranker.Options(trade=0.5, attribute="genre"), context())
    assert rerank(mmr, [0, 1, 3], 3, [1.0, 0.9, 0.5])[0] == [0, 2, 1]


def test_items_beyond_the_pool_follow_in_their_order_and_unknown_ones_are_like_nothing() -> None:
    mmr = MmrReranker(MmrReranker.Options(trade=0.5, pool=3), context(vectors=VECTORS))
    assert rerank(mmr, [0, 1, 2, 3, 4], 5, [1.0, 0.9, 0.5, 0.4, 0.3])[0] == [0, 2, 1, 3, 4]
    assert rerank(mmr, [0, 1, -1], 3, [1.0, 0.9, 0.5])[0] == [0, 2, 1]
    assert rerank(mmr, [], 3, []) == ([], {})
    assert rerank(mmr, [0, 1, 2], 2, [0.5, 0.5, 0.5])[0] == [0, 2], "equal scores: variety decides"


@pytest.mark.parametrize("options", [{"trade": 1.1}, {"trade": float("nan")}, {"pool": 0}, {"lambda": 0.5}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MmrReranker.Options.model_validate(options)
