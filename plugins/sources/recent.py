"""Candidate source `recent`: what happened last."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from engine.components import Candidates, CandidateSource, PluginOptions, SourceContext, UserState
from engine.hookspecs import hookimpl


class RecentSource(CandidateSource):
    """The items whose newest event is latest: news, fresh stock, what is talked about now.

    Score: time of the item's newest event in the data, as a share of the newest of all (1: the newest). Items without
    an event are not proposed.
    """

    name = "recent"

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        self._rows = _newest_first(context.latest, 0)
        self._known = len(context.latest)  # rows that those are of
        self._new_rows = self._rows[:0]  # of items that came since

    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates:
        """The same k items for everybody; ties by catalogue row."""
        rows, latest = np.concatenate([self._rows[:k], self._new_rows[:k]]), self.context.latest
        rows = rows[np.argsort(-latest[rows], kind="stable")][:k]
        times = latest[rows].astype(np.float64)
        return Candidates(rows, (times / times[0] if len(times) else times).astype(np.float32))

    def grown(self, context: SourceContext) -> Self:
        """Only what came since is sorted, until it is much."""
        if len(context.latest) - self._known > max(1024, self._known // 64):
            return type(self)(self.options, context)
        grown = copy.copy(self)
        grown.context, grown._new_rows = context, _newest_first(context.latest, self._known)
        return grown


def _newest_first(latest: np.ndarray, first: int) -> np.ndarray:
    """Rows int64 from `first` on that have an event."""
    order = np.argsort(-latest[first:], kind="stable").astype(np.int64) + first
    return order[latest[order] > 0]


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    return [RecentSource]
