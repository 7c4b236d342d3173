"""The candidate source `editorial`: what the editors chose, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from engine.components import Candidates, CandidateSource, PluginOptions, SourceContext, UserState
from engine.hookspecs import hookimpl


class EditorialSource(CandidateSource):
    """The items that the configuration lists, the first with the highest score; unknown items are left out."""

    name = "editorial"

    class Options(PluginOptions):
        items: list[str] = Field(min_length=1, max_length=2000, description="item ids, best first")

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        rows = context.catalogue.rows(options.items)
        self._rows = rows[rows >= 0].astype(np.int64)
        self._scores = np.linspace(1.0, 0.0, len(self._rows), endpoint=False, dtype=np.float32)

    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates:
        """The first k, the same for everybody."""
        return Candidates(self._rows[:k], self._scores[:k])


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    """What this module brings."""
    return [EditorialSource]
