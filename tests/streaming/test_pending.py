"""Features as served: what waits for its label reads as the scorer read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.errors import CheckpointError
from engine.events import RankingData
from engine.hashing import fingerprint
from engine.schema import Schema
from engine.streaming.join.pending import PendingExamples
from tests.streaming.served_world import ENCODER, NUMERIC, SCHEMA, as_request, catalogue, columns, ranking

ANY_SPEED = settings(deadline=None, max_examples=150)

ITEMS = st.one_of(st.sampled_from(["1", 2, "книга", "🎈", "unknown", 77]), st.text(min_size=1, max_size=3))
WORD = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=4), st.just("naïve 用户"))
NUMBER = st.one_of(st.none(), st.floats(-10, 10), st.integers(-5, 20), st.just(float("nan")), st.booleans())
WORDS = st.one_of(WORD, st.lists(WORD, max_size=5), st.just("x| y |"))
USER = st.fixed_dictionaries(
    {}, optional={"who": WORD, "job": WORD, "likes": WORDS, "age": NUMBER, "visits": NUMBER, "hour": WORD}
)
CONTEXT = st.fixed_dictionaries({}, optional={"hour": WORD, "delay": NUMBER, "job": WORD})


@st.composite
def rankings(draw: Any, most: int = 4) -> list[RankingData]:
    """Some without a user's values, without history, without items."""
    found = []
    for number in range(draw(st.integers(0, most))):
        items = draw(st.lists(ITEMS, max_size=4))
        overrides = {
            name: draw(st.lists(values, min_size=len(items), max_size=len(items)))
            for name, values in (("brand", WORD), ("tags", WORDS), ("price", NUMBER), ("stars", NUMBER), ("mood", WORD))
            if draw(st.booleans())
        }
        found.append(
            ranking(
                f"request-{number}",
                draw(st.sampled_from(["ann", "用户-1", 42])),
                items,
                user_features=draw(st.one_of(st.none(), USER)),
                context=draw(st.one_of(st.none(), CONTEXT)),
                history=draw(st.one_of(st.none(), st.lists(ITEMS, max_size=6))),
                item_features=overrides or None,
            )
        )
    return found


def assert_reads_as(batch: Batch, row: int, expected: Batch, target: int) -> None:
    """Row of a training batch against one target of a request's batch, feature by feature."""
    mine, theirs = batch.jagged(), expected.jagged()
    assert list(mine) == list(theirs) == [f.name for f in SCHEMA.embedded]
    for feature in SCHEMA.embedded:
        a = mine[feature.name].to_dense()[row]
        b = theirs[feature.name].to_dense()[0 if feature.from_request else target]
        assert a.tolist() == b.tolist(), feature.name
    assert batch.dense_user[row].tolist() == expected.dense_user[0].tolist()
    assert batch.dense_item[row].tolist() == expected.dense_item[target].tolist()


@ANY_SPEED
@given(rankings())
def test_what_waits_reads_as_the_scorer_read_it(data: list[RankingData]) -> None:
    things = catalogue()
    pending = PendingExamples(ENCODER, things)
    shown = pending.add(columns(data, 1000.0))
    assert shown.refused == {}
    assert shown.offsets.tolist() == [0, *np.cumsum([len(its.items) for its in data]).tolist()]
    batch = pending.take(shown.slot)
    assert (batch.users, batch.targets) == (len(shown.slot), len(shown.slot))
    assert batch.user_of_target.tolist() == list(range(len(shown.slot)))
    assert batch.time is not None
    assert batch.user_key is not None
    assert batch.item_key is not None
    row = 0
    for number, its in enumerate(data):
        expected = ENCODER.encode_request(as_request(its), things) if its.items else None
        for target, item in enumerate(its.items):
            assert expected is not None
            assert_reads_as(batch, row, expected, target)
            assert int(batch.user_key[row]) == fingerprint(its.user)
            assert int(batch.item_key[row]) == int(shown.item[row]) == fingerprint(item.id)
            assert int(batch.time[row]) == 1000 + number
            row += 1


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.ids.values(), b.ids.values())
    assert torch.equal(a.ids.lengths(), b.ids.lengths())
    for name in ("dense_user", "dense_item", "user_of_target", "time", "user_key", "item_key"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@ANY_SPEED
@given(st.lists(rankings(3), min_size=1, max_size=6), st.data())
def test_rows_are_used_again_and_a_store_that_is_loaded_goes_on_as_it_was(
    calls: list[list[RankingData]], data: Any
) -> None:
    split = data.draw(st.integers(0, len(calls)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    things = catalogue()
    one, two = PendingExamples(ENCODER, things), PendingExamples(ENCODER, things)
    live: dict[int, tuple[ScoreRequest, int]] = {}
    most = 0
    for number, call in enumerate(calls):
        if number == split:
            state = two.state()
            two = PendingExamples(ENCODER, things)
            two.load(state)
        shown, again = one.add(columns(call)), two.add(columns(call))
        assert shown.slot.tolist() == again.slot.tolist()
        assert not set(shown.slot.tolist()) & set(live)
        targets = [(as_request(its), target) for its in call for target in range(len(its.items))]
        live |= dict(zip(shown.slot.tolist(), targets, strict=True))
        most = max(most, len(live))
        slots = random.permutation(list(live)).astype(np.int64)
        batch = one.take(slots)
        same(batch, two.take(slots))
        for row, slot in enumerate(slots.tolist()):
            request, target = live[slot]
            assert_reads_as(batch, row, ENCODER.encode_request(request, things), target)
        gone = slots[: random.integers(0, len(slots) + 1)]
        for pending in (one, two):
            pending.release(gone)
        live = {slot: its for slot, its in live.items() if slot not in gone}
        assert len(one) == len(two) == len(live)
    assert one._items.top <= most, "rows are not used again"
    for (name, a), (_, b) in zip(one.state().items(), two.state().items(), strict=True):
        assert a.tobytes() == b.tobytes(), name


def test_room_follows_what_waits_and_not_what_came() -> None:
    pending = PendingExamples(ENCODER, catalogue())
    waiting: list[np.ndarray] = []
    for number in range(400):
        history = [str(n) for n in range(number % 5)]
        data = [ranking(f"{number}-{n}", "ann", ["1", "2"], history=history) for n in range(10)]
        waiting.append(pending.add(columns(data)).slot)
        if len(waiting) > 3:
            pending.release(waiting.pop(0))
    assert pending._items.top == 80
    assert pending._requests.top == 40
    assert len(pending._requests._jagged["past"]._values) <= 1024
    for slots in waiting:
        pending.release(slots)
    assert len(pending) == len(pending._requests) == 0


def test_what_is_kept_stays_as_it_was_served_when_the_catalogue_grows() -> None:
    things = catalogue()
    pending = PendingExamples(ENCODER, things)
    before = pending.add(columns([ranking("a", "ann", ["1", "new"])])).slot
    pending.catalogue = things.updated(["1", "new"], [{"brand": "z"}, {"brand": "z"}], ENCODER)
    after = pending.add(columns([ranking("b", "ann", ["1", "new"])])).slot
    brands = pending.take(np.concatenate([before, after])).jagged()["brand"].values().tolist()
    assert brands == [fingerprint("a"), fingerprint(""), fingerprint("z"), fingerprint("z")]


def test_a_ranking_of_another_server_reads_with_its_user_s_id_and_one_of_this_server_as_it_says() -> None:
    pending = PendingExamples(ENCODER, catalogue())
    data = [ranking("a", "ann", ["1"]), ranking("b", "b", ["1"], user_features={})]
    who = pending.take(pending.add(columns(data)).slot).jagged()["who"].values().tolist()
    assert who == [fingerprint("ann"), fingerprint("")]


def test_rankings_whose_values_cannot_be_read_are_refused_and_the_others_taken() -> None:
    pending = PendingExamples(ENCODER, catalogue())
    data = [
        ranking("a", "ann", ["1", "2"], user_features={"visits": "many"}),
        ranking("b", "ann", ["1", "2"]),
        ranking("c", "ann", ["2"], item_features={"price": ["cheap"]}),
        ranking("d", "ann", ["2"], user_features={"job": "\ud800"}),
        ranking("e", "ann", ["🎈"]),
    ]
    shown = pending.add(columns(data))
    assert sorted(shown.refused) == [0, 2, 3]
    assert "feature 'visits' is numeric, got 'many'" in shown.refused[0]
    assert shown.offsets.tolist() == [0, 0, 2, 2, 2, 3]
    assert shown.item.tolist() == [fingerprint(i) for i in ("1", "2", "🎈")]
    assert len(pending) == 3


def test_a_state_of_other_features_is_refused() -> None:
    state = PendingExamples(ENCODER, catalogue()).state()
    fewer = Schema(features=SCHEMA.features[:-1], user="user", item="item", time="time")
    with pytest.raises(CheckpointError, match="other features"):
        PendingExamples(FeatureEncoder(fewer, NUMERIC), catalogue()).load(state)
