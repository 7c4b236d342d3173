"""Candidate source `recent`: what happened last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        order = np.argsort(-context.latest, kind="stable").astype(np.int64)
        self._rows = order[context.latest[order] > 0]
        times = context.latest[self._rows].astype(np.float64)
        self._scores = (times / times[0] if len(times) else times).astype(np.float32)

    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates:
        """The same k items for everybody; ties by catalogue row."""
        return Candidates(self._rows[:k], self._scores[:k])


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    return [RecentSource]
