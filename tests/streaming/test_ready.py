"""The queue of joined examples: a slot is free once every example that was before it has been taken, not sooner."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.streaming.join.emitted import Emitted
from engine.streaming.join.ready import ReadyExamples

_NONE = np.empty(0, np.int64)


def emitted(slots: list[int], freed: list[int]) -> Emitted:
    n = len(slots)
    ids, ones = np.array(slots, np.int64), np.ones(n, np.float32)
    labels = np.zeros((n, 1), np.float32)
    return Emitted(
        ids, ids, ids, labels, ones, ones, ones.astype(float), ones.astype(np.int8), np.array(freed, np.int64), _NONE
    )


@settings(deadline=None)
@given(st.lists(st.one_of(st.tuples(st.integers(0, 6), st.integers(0, 4)), st.integers(1, 5)), max_size=40), st.data())
def test_slots_are_free_when_what_was_before_them_is_taken(
    steps: list[tuple[int, int] | int], data: st.DataObject
) -> None:
    """Against a list of (slot, examples before it): pairs push, numbers pop."""
    ready = ReadyExamples(1)
    number = taken = pushed = 0
    waiting: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, tuple):
            slots = list(range(number, number + step[0] + step[1]))
            number += len(slots)
            ready.push(emitted(slots[: step[0]], slots[step[0] :]))
            pushed += step[0]
            waiting += [(slot, pushed) for slot in slots[step[0] :]]
        else:
            taken += len(ready.pop(step))
        assert ready.free().tolist() == [slot for slot, before in waiting if before <= taken]
        waiting = [(slot, before) for slot, before in waiting if before > taken]
        assert len(ready) == pushed - taken
        if data.draw(st.booleans()):
            state, ready = ready.state(), ReadyExamples(1)
            ready.load(state)
