"""Presumed negatives beside a join that waits: what becomes of impressions is the same, and each is presumed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config_learning import JoinConfig
from engine.errors import ConfigError
from engine.streaming.join.emitted import NEGATIVE, POSITIVE, PRESUMED, SETTLED, Emitted
from engine.streaming.join.join import Joiner
from engine.streaming.join.thinning import uniform
from tests.streaming.test_join import Stream, said
from tests.streaming.test_join_identity import CALLS, CONFIG, TASKS, TYPES, Slots, run

SEED = 7


def told(out: Emitted) -> Counter[tuple[int, int, float, int]]:
    """(slot, task, label, kind) of all but the presumed; a settled one counts as a negative."""
    found: Counter[tuple[int, int, float, int]] = Counter()
    for slot, labels, kind in zip(out.slot.tolist(), out.labels, out.kind.tolist(), strict=True):
        if kind != PRESUMED:
            found.update(
                (slot, t, float(v), NEGATIVE if kind == SETTLED else kind) for t, v in enumerate(labels) if v == v
            )
    return found


@settings(deadline=None, max_examples=200)
@given(CALLS, CONFIG, st.sampled_from([0.0, 5.0]), st.data())
def test_impressions_end_as_if_it_waited_and_each_is_presumed_once(
    calls: list[Any], options: dict[str, Any], after: float, data: Any
) -> None:
    """Also where the join is saved and loaded in between."""
    options = options | {"window_seconds": data.draw(st.sampled_from([10.0, {"click": 10.0, "order": 25.0}]))}
    config, split = JoinConfig(**options), data.draw(st.integers(0, len(calls)))
    waits = Joiner(TASKS, TYPES, config, SEED)
    presumes = Joiner(TASKS, TYPES, config, SEED, {"order": after})
    slots, other = Slots(), Slots()
    presumed: Counter[tuple[int, int]] = Counter()
    settled: set[int] = set()
    for number, call in enumerate([*calls, ("advance", np.inf)]):
        if number == split:
            state, presumes = presumes.state(), Joiner(TASKS, TYPES, config, SEED, {"order": after})
            presumes.load(state)
        one, two = run(waits, call, slots), run(presumes, call, other)
        assert told(one) == told(two)
        assert set(one.freed.tolist()) == set(two.freed.tolist())
        early = two.kind == PRESUMED
        assert (two.labels[early, 1] == 0).all()
        assert np.isnan(two.labels[early, 0]).all(), "the other task waits"
        presumed.update(zip(two.request[early].tolist(), two.item[early].tolist(), strict=True))
        assert not settled & set(two.slot[early].tolist()), "not after it was settled"
        settled |= set(two.slot[two.kind == SETTLED].tolist())
    counts = presumes.counts
    assert counts["order.presumed"] == presumed.total()
    assert counts["order.presumed"] == counts["impressions"] or config.negatives < 1
    assert {name: n for name, n in counts.items() if name != "order.presumed"} == waits.counts
    for request, item in presumed:
        assert uniform(np.array([request]), np.array([item]), SEED)[0] < config.negatives


def test_a_negative_at_once_a_positive_again_and_what_is_left_is_settled() -> None:
    stream = Stream(window_seconds=100)
    stream.joiner = Joiner(["click"], {"click": ["click"]}, JoinConfig(window_seconds=100), presumed={"click": 0.0})
    assert said(stream.add((1, 0.0, [1, 2]))) == [(11, [0.0], PRESUMED), (12, [0.0], PRESUMED)]
    assert said(stream.add((1, 1.0, [1, 2]))) == [], "a copy of the ranking"
    assert said(stream.add(then=[(1, 2, "click", 30.0)])) == [(12, [1.0], POSITIVE)]
    assert said(stream.advance(100.5)) == [(11, [0.0], SETTLED)]


def test_after_some_seconds_those_that_are_positive_by_then_are_presumed_negative_too() -> None:
    """Else the stream would not say p / (1 + p), which the loss is corrected for."""
    stream = Stream(window_seconds=100)
    stream.joiner = Joiner(["click"], {"click": ["click"]}, JoinConfig(window_seconds=100), presumed={"click": 10.0})
    assert said(stream.add((1, 0.0, [1, 2]), then=[(1, 2, "click", 3.0)])) == [(12, [1.0], POSITIVE)]
    assert said(stream.advance(10.0)) == []
    assert said(stream.advance(10.5)) == [(11, [0.0], PRESUMED), (12, [0.0], PRESUMED)]
    assert said(stream.advance(100.5)) == [(11, [0.0], SETTLED)]


def test_a_presumption_that_is_not_within_the_window_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"learning\.join\.feedback: task 'click' presumes negatives after 100 seconds"
    ):
        Joiner(["click"], {}, JoinConfig(window_seconds=100), presumed={"click": 100.0})
