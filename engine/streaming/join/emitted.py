"""What the join gives: labelled examples by the rows that hold their features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POSITIVE, NEGATIVE, CORRECTION, PRESUMED, SETTLED = range(5)
"""Kinds of examples. A correction is positive, of an impression that may have been trained as a negative. A presumed
one is a negative whose window is open (`DelayedFeedback`), a settled one is such a negative at its window's end."""

KINDS = ("positive", "negative", "correction", "presumed", "settled")
"""Their names, in the order of their numbers."""

_JUDGED = np.array([True, True, False, False, True])
_TRAINED = np.array([True, True, True, True, False])


def judged(kind: np.ndarray) -> np.ndarray:
    """bool [n]: whether an example says what became of its impression, as one example of each does. kind int8 [n]."""
    return _JUDGED[kind]


def trained(kind: np.ndarray) -> np.ndarray:
    """bool [n]: whether an example is trained; a settled one was, when it was presumed. kind int8 [n]."""
    return _TRAINED[kind]


@dataclass(frozen=True)
class Emitted:
    """e examples, in the order in which they are trained.

    slot int64 [e]: rows of the pending store. request, item int64 [e]: fingerprints. labels float32 [e, tasks]: NaN
    where the row says nothing of a task. weight float32 [e]. rate float32 [e]: share of the negatives that is kept.
    seconds float64 [e]: time of the interaction; for negatives, of the ranking. kind int8 [e].
    freed int64 [f]: pending rows that nobody needs once these examples are taken.
    foreign int64 [g]: which of the call's interactions name an item that their ranking did not show.
    """

    slot: np.ndarray
    request: np.ndarray
    item: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    rate: np.ndarray
    seconds: np.ndarray
    kind: np.ndarray
    freed: np.ndarray
    foreign: np.ndarray

    def __len__(self) -> int:
        return len(self.slot)


_DTYPES = (np.int64, np.int64, np.int64, np.int32, np.int32, np.float64, np.int8)


class Rows:
    """Examples as they are found, in any order."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = [tuple(np.empty(0, d) for d in _DTYPES)]
        self._order: list[tuple[np.ndarray, np.ndarray]] = []

    def put(
        self,
        order: tuple[np.ndarray, np.ndarray],
        kind: int,
        slot: np.ndarray,
        request: np.ndarray,
        item: np.ndarray,
        ones: np.ndarray,
        zeros: np.ndarray,
        seconds: np.ndarray,
    ) -> None:
        """ones, zeros int32 [e]: tasks that are positive and negative, a bit each. order: first and second sort key."""
        self._order.append(order)
        self._parts.append((slot, request, item, ones, zeros, seconds, np.full(len(slot), kind, np.int8)))

    def emitted(self, tasks: int, rate: float, freed: np.ndarray, foreign: np.ndarray) -> Emitted:
        """The rows by their keys; of equal ones the first that was put."""
        slot, request, item, ones, zeros, seconds, kind = (
            np.concatenate(column) for column in zip(*self._parts, strict=True)
        )
        if self._order:
            first, second = (np.concatenate(keys) for keys in zip(*self._order, strict=True))
            order = np.lexsort((second, first))
            slot, request, item, ones, zeros, seconds, kind = (
                column[order] for column in (slot, request, item, ones, zeros, seconds, kind)
            )
        labels = np.full((len(slot), tasks), np.nan, np.float32)
        for task in range(tasks):
            labels[(zeros >> task) & 1 == 1, task] = 0
            labels[(ones >> task) & 1 == 1, task] = 1
        weight, rates = np.ones(len(slot), np.float32), np.full(len(slot), rate, np.float32)
        return Emitted(slot, request, item, labels, weight, rates, seconds, kind, freed, foreign)
