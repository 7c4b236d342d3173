"""Reranker `mmr`: maximal marginal relevance."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from engine.components import PluginOptions, Reranker, SourceContext
from engine.errors import PluginError
from engine.hookspecs import hookimpl
from plugins.rerank.attributes import read_attribute


class MmrReranker(Reranker):
    """Trades score against likeness to what stands above: relevant and varied (Carbonell and Goldstein 1998).

    Takes, k times, the item with the largest `trade * score - (1 - trade) * likeness`, where likeness is the largest
    cosine to any item taken before (none below 0). Scores are scaled to [0, 1] over the pool, so that `trade` means the
    same for any model. Likeness comes from the encoder's item vectors, or an attribute (cosine of its values) where
    there is no encoder or the option names one. Items unknown to the catalogue are like nothing.
    """

    name = "mmr"

    class Options(PluginOptions):
        trade: float = Field(0.7, ge=0, le=1, description="1: by score alone, 0: by variety alone")
        pool: int = Field(200, ge=1, le=2000, description="best items that are considered; the rest keep their order")
        attribute: str | None = Field(None, description="likeness by this attribute in place of the encoder's vectors")
        separator: str = Field("|", min_length=1, max_length=4, description="splits a string into several values")

    options: Options

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        name = self.options.attribute
        if name is None and context.vectors is None:
            raise PluginError(
                "reranker 'mmr' has nothing to compare items by: the bundle has no item vectors; add a section "
                "'retrieval' and train again, or name an attribute in the option 'attribute'"
            )
        self._attribute = None if name is None else read_attribute(context.catalogue, name, self.options.separator)

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """rows int64 [n] -> float32 [n, D] of length one, zeros for unknown items."""
        if self._attribute is not None:
            vectors = self._attribute.one_hot(rows)
        else:
            assert self.context.vectors is not None
            vectors = np.array(self.context.vectors[np.maximum(rows, 0)], dtype=np.float32)
            vectors[rows < 0] = 0.0
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1.0)

    def rerank(self, rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, dict[int, str]]:
        """O(k * pool * D) in numpy; the rule names items that stand higher than their score alone would put them."""
        pool = min(len(rows), self.options.pool)
        taken = self._greedy(rows[:pool], scores[:pool], min(k, pool))
        order = np.concatenate([taken, np.arange(pool, len(rows), dtype=np.int64)])[:k]
        raised = np.flatnonzero(order > np.arange(len(order)))
        return order, {int(order[place]): f"mmr: raised for variety to place {place + 1}" for place in raised}

    def _greedy(self, rows: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
        vectors = self._vectors(rows)
        low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
        relevance = self.options.trade * (scores - low) / (high - low if high > low else 1.0)
        likeness = np.zeros(len(rows), dtype=np.float32)
        open_ = np.zeros(len(rows), dtype=np.float32)  # -inf once taken
        taken = np.empty(k, dtype=np.int64)
        for place in range(k):
            best = int(np.argmax(relevance - (1.0 - self.options.trade) * likeness + open_))
            taken[place] = best
            open_[best] = -np.inf
            likeness = np.maximum(likeness, vectors @ vectors[best])
        return taken


@hookimpl
def rerankers() -> list[type[Reranker]]:
    return [MmrReranker]
