"""Candidate source `retriever`: the nearest items to the user's vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.components import Candidates, CandidateSource, PluginOptions, SourceContext, UserState
from engine.errors import PluginError
from engine.hookspecs import hookimpl


class RetrieverSource(CandidateSource):
    """The items whose vectors are nearest to the user's, found by the configured retriever.

    The user's vector comes from the encoder (features, context and history of the request), so it moves with every
    click. Score: the inner product. Needs the section `retrieval` in the configuration.
    """

    name = "retriever"

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        if context.retriever is None or context.encode_user is None:
            raise PluginError(
                "candidate source 'retriever' needs a trained encoder: add a section 'retrieval' to the "
                "configuration and train again, or take another source (popular, recent)"
            )

    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates:
        """At most k items, best first; fewer when the catalogue is smaller."""
        assert self.context.retriever is not None
        query = np.asarray(self.context.encode_user(user, request), dtype=np.float32).reshape(1, -1)
        rows, scores = self.context.retriever.search(query, min(k, len(self.context.catalogue)))
        found = (rows[0] >= 0) & (rows[0] < len(self.context.catalogue))  # the retriever may know newer items
        return Candidates(rows[0][found], scores[0][found])


@hookimpl
def candidate_sources() -> list[type[CandidateSource]]:
    return [RetrieverSource]
