"""Candidate source `popular`: what most people liked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from engine.appended import appended
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

    def grown(self, context: SourceContext) -> Self:
        """New items behind the others: none of them has a positive."""
        new = np.arange(len(self._rows), len(context.counts), dtype=np.int64)
        if context.counts[new].any():
            return type(self)(self.options, context)
        grown = copy.copy(self)
        grown.context = context
        grown._rows = appended(self._rows, new)
        grown._scores = appended(self._scores, np.zeros(len(new), np.float32))
        return grown


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    return [PopularSource]
