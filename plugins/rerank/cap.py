"""Reranker `cap`: at most n of one kind."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from engine.components import PluginOptions, Reranker, SourceContext
from engine.hookspecs import hookimpl
from plugins.rerank.attributes import read_attribute


class CapReranker(Reranker):
    """Keeps at most n items of one attribute value: three of a brand, two of a genre.

    Goes down the ranking; an item counts against each of its values and is dropped where any of them is full. Items
    without a value, and items unknown to the catalogue, are never dropped.
    """

    name = "cap"

    class Options(PluginOptions):
        attribute: str = Field(min_length=1, description="item attribute or feature, for instance a genre or a brand")
        n: int = Field(3, ge=1, description="most items of one value")
        separator: str = Field("|", min_length=1, max_length=4, description="splits a string into several values")

    options: Options

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        super().__init__(options, context)
        self._attribute = read_attribute(context.catalogue, self.options.attribute, self.options.separator)

    def rerank(self, rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, dict[int, str]]:
        """Stops at the k-th item kept; the rule names the items that rose over a dropped one."""
        offsets, codes = self._attribute.offsets, self._attribute.codes
        counts = [0] * self._attribute.distinct
        kept: list[int] = []
        rules: dict[int, str] = {}
        rule = f"cap: at most {self.options.n} per {self.options.attribute}"
        dropped = False
        for position, row in enumerate(rows.tolist()):
            values = codes[offsets[row] : offsets[row + 1]].tolist() if row >= 0 else []
            if any(counts[value] >= self.options.n for value in values):
                dropped = True
                continue
            for value in values:
                counts[value] += 1
            if dropped:
                rules[position] = rule
            kept.append(position)
            if len(kept) == k:
                break
        return np.asarray(kept, dtype=np.int64), rules


@hookimpl
def rerankers() -> list[type[Reranker]]:
    return [CapReranker]
