"""Candidate source `popular`: what most people liked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.components import Candidates, CandidateSource, PluginOptions, SourceContext, UserState
from engine.hookspecs import hookimpl


class PopularSource(CandidateSource):
    """The items with most positives in the training split: the answer for a user of whom nothing is known.

    The order is made once a bundle; a request costs a slice. Score: log1p of the count. Items without a positive come
    last, so that a small catalogue is still filled.
    """

    name = "popular"

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        self._rows = np.argsort(-context.counts, kind="stable").astype(np.int64)
        self._scores = np.log1p(context.counts[self._rows]).astype(np.float32)

    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates:
        """The same k items for everybody; ties by catalogue row."""
        return Candidates(self._rows[:k], self._scores[:k])


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    return [PopularSource]
