"""The queue of joined examples: order, what is free when, and a mix of classes in every batch."""

from __future__ import annotations

import numpy as np

from engine.streaming.join.emitted import NEGATIVE, POSITIVE, Emitted
from engine.streaming.join.ready import ReadyExamples


def emitted(slots: list[int], kind: int, freed: list[int], *, rate: float = 1.0) -> Emitted:
    n, slot = len(slots), np.array(slots, np.int64)
    labels = np.full((n, 1), float(kind == POSITIVE), np.float32)
    return Emitted(
        slot, slot + 100, slot + 200, labels, np.ones(n, np.float32), np.full(n, rate, np.float32),
        slot.astype(np.float64), np.full(n, kind, np.int8), np.array(freed, np.int64), np.empty(0, np.int64),
    )  # fmt: skip


def test_positives_and_negatives_of_a_chunk_are_spread_over_each_other() -> None:
    ready = ReadyExamples(1)
    ready.push(emitted([1, 2], POSITIVE, []), emitted([11, 12, 13, 14, 15, 16], NEGATIVE, [99]))
    got = ready.pop(8)
    # places (i + 1/2) / n: 1/4 and 3/4 among 1/12, 3/12, 5/12, 7/12, 9/12, 11/12; where equal, the first first
    assert got.slot.tolist() == [11, 1, 12, 13, 14, 2, 15, 16]
    assert (got.request == got.slot + 100).all()
    assert (got.labels[:, 0] == np.isin(got.slot, [1, 2])).all()
    assert ready.free().tolist() == [99]


def test_every_batch_of_a_large_chunk_has_the_chunks_share_of_positives() -> None:
    ready = ReadyExamples(1)
    ready.push(emitted(list(range(300)), POSITIVE, []), emitted(list(range(300, 1200)), NEGATIVE, []))
    while len(ready):
        assert ready.pop(40).labels.mean() == 0.25


def test_pushes_follow_each_other_and_slots_are_free_when_what_was_before_them_is_taken() -> None:
    ready = ReadyExamples(1)
    ready.push(emitted([1, 2], POSITIVE, [7]), emitted([], NEGATIVE, [8]))
    ready.push(emitted([3], NEGATIVE, [9]))
    assert ready.pop(1).slot.tolist() == [1]
    assert ready.free().tolist() == []
    assert ready.pop(1).slot.tolist() == [2]
    assert ready.free().tolist() == [7, 8]
    assert ready.pop(5).slot.tolist() == [3]
    assert ready.free().tolist() == [9]


def test_a_thinned_negative_stands_for_those_that_were_left_out() -> None:
    ready = ReadyExamples(1)
    ready.push(emitted([1], POSITIVE, [], rate=0.25), emitted([2], NEGATIVE, [], rate=0.25))
    assert ready.pop(2).stands_for.tolist() == [1.0, 4.0]
