"""The join's tables: fingerprints to rows, times in order, interactions that wait, events seen before."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.streaming.join.deadlines import Deadlines
from engine.streaming.join.dedupe import SeenEvents
from engine.streaming.join.print_index import PrintIndex
from engine.streaming.join.waiting import WaitingInteractions

ANY_SPEED = settings(deadline=None)
INT64 = st.integers(-(2**63), 2**63 - 1)
PRINTS = st.lists(st.one_of(st.integers(-3, 3), INT64), unique=True, max_size=30)


@ANY_SPEED
@given(st.lists(PRINTS, max_size=10), PRINTS)
def test_an_index_gives_the_row_that_a_fingerprint_was_given_last(calls: list[list[int]], asked: list[int]) -> None:
    index, expected, row = PrintIndex(), {}, 0
    for prints in calls:
        rows = np.arange(row, row + len(prints))
        row += len(prints)
        index.put(np.array(prints, np.int64), rows)
        expected |= dict(zip(prints, rows.tolist(), strict=True))
    asked = [*asked, *expected]
    assert index.get(np.array(asked, np.int64)).tolist() == [expected.get(p, -1) for p in asked]
    assert len(index) == len(expected)


def test_an_index_grows_and_can_be_rebuilt() -> None:
    prints = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50_000)
    index = PrintIndex()
    for part in np.split(np.arange(50_000), 100):
        index.put(prints[part], part)
    assert (index.get(prints) == np.arange(50_000)).all()
    assert (index.get(prints + 1) == -1).all()
    index.rebuild(prints[:10], np.arange(10, 20))
    assert index.get(prints[:11]).tolist() == [*range(10, 20), -1]


@ANY_SPEED
@given(st.data())
def test_deadlines_are_found_in_order(data: Any) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = np.empty(0)
    deadlines = Deadlines()
    for _ in range(data.draw(st.integers(1, 6))):
        more = random.integers(0, 20, data.draw(st.sampled_from([0, 1, 30, 700]))).astype(float)
        more[random.random(len(more)) < 0.2] = np.inf
        deadlines.append(more)
        values = np.append(values, more)
        if len(values):
            rows = random.choice(len(values), min(5, len(values)), replace=False)
            values[rows] = random.choice([np.inf, 3.0, 25.0], len(rows))
            deadlines.set(rows, values[rows])
    order = [int(i) for i in np.lexsort((np.arange(len(values)), values)) if values[i] < np.inf]
    for limit in (0.0, 3.0, 3.5, 100.0):
        assert deadlines.before(limit).tolist() == [i for i in order if values[i] < limit]
    for count in (0, 1, 5, 100, 5000):
        assert deadlines.first(count).tolist() == order[:count]


@ANY_SPEED
@given(st.data())
def test_interactions_wait_until_their_request_comes_or_time_is_up(data: Any) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    waiting, expected = WaitingInteractions(), []
    number = 0
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.sampled_from([0, 3, 50, 5000]))
        request, item = random.integers(1, 40, count), np.arange(number, number + count)
        number += count
        seconds = random.integers(0, 1000, count).astype(float)
        waiting.add(request, item, np.ones(count, np.int32), seconds)
        expected += list(zip(request.tolist(), item.tolist(), seconds.tolist(), strict=True))
        match data.draw(st.sampled_from(["pop", "expire", "trim", "state"])):
            case "pop":
                wanted = random.choice(45, 5, replace=False)
                taken = waiting.pop(wanted)
                mine = [item for request, item, _ in expected if request in wanted]
                assert (taken["item"].tolist() if taken else []) == mine
                expected = [e for e in expected if e[0] not in wanted]
            case "expire":
                kept = [e for e in expected if e[2] >= 200]
                assert waiting.expire(200.0) == len(expected) - len(kept)
                expected = kept
            case "trim":
                excess = max(0, len(expected) - 100)
                assert waiting.trim(100) == excess
                gone = set(sorted(expected, key=lambda e: (e[2], e[1]))[:excess])
                expected = [e for e in expected if e not in gone]
            case "state":
                state = waiting.state()
                waiting = WaitingInteractions()
                waiting.load(state)
        assert len(waiting) == len(expected)


@ANY_SPEED
@given(st.lists(st.lists(st.integers(-5, 20), max_size=12), max_size=12), st.sampled_from([1, 3, 8, 100]), st.data())
def test_events_are_new_once_until_they_are_forgotten(calls: list[list[int]], capacity: int, data: Any) -> None:
    split = data.draw(st.integers(0, len(calls)))
    seen, expected = SeenEvents(capacity), OrderedDict()
    for number, prints in enumerate(calls):
        if number == split:
            state = seen.state()
            seen = SeenEvents(capacity)
            seen.load(state)
        known = set(expected)
        mask = []
        for value in prints:
            mask.append(value not in known)
            known.add(value)
        assert seen.new(np.array(prints, np.int64)).tolist() == mask
        for value, fresh in zip(prints, mask, strict=True):
            if fresh:
                expected[value] = None
        while len(expected) > capacity:
            expected.popitem(last=False)
        assert seen.state()["seen"].tolist() == list(expected)
        assert len(seen) == len(expected)


def test_events_stay_within_their_capacity_over_many_calls() -> None:
    seen = SeenEvents(5_000)
    for start in range(0, 100_000, 500):
        assert seen.new(np.arange(start, start + 500)).all()
        assert not seen.new(np.arange(max(0, start - 4_000), start + 500)).any()
    assert len(seen) == 5_000
    assert len(seen._index) <= 2 * 5_000 + 500
