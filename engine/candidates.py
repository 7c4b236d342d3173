"""Candidates of several sources as one list, and what may not stay in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.components import Candidates


@dataclass
class Merged:
    """Catalogue rows int64 [n], distinct, best first; fallback float32 [n] in (0, 1], descending: a score for want of a
    model's; sources uint64 [n]: bit s is set where source s proposed the item."""

    rows: np.ndarray
    fallback: np.ndarray
    sources: np.ndarray

    def take(self, positions: np.ndarray) -> Merged:
        return Merged(self.rows[positions], self.fallback[positions], self.sources[positions])

    def named(self, position: int, names: Sequence[str]) -> list[str]:
        """Names of the sources that proposed the item at a position."""
        bits = int(self.sources[position])
        return [name for number, name in enumerate(names) if bits >> number & 1]


def wrong_candidates(found: object, items: int) -> str | None:
    """Why an answer of a source is not one, or None. items: size of the catalogue."""
    if not isinstance(found, Candidates):
        return f"answered {type(found).__name__}, not Candidates"
    rows, scores = np.asarray(found.rows), np.asarray(found.scores)
    if rows.ndim != 1 or rows.shape != scores.shape or not np.issubdtype(rows.dtype, np.integer):
        return f"answered rows {rows.dtype}{rows.shape} and scores of shape {scores.shape}"
    if len(rows) and not (rows.min() >= 0 and rows.max() < items):
        return "answered rows outside the catalogue"
    if not np.isfinite(scores).all():
        return "answered scores that are not finite"
    return None


def merge(found: Sequence[tuple[int, Candidates]], limit: int) -> Merged:
    """The sources' best first, then their second, ...; an item that several propose stands once, with all named.

    found: (number of the source, its candidates). limit: most items kept.
    """
    if not found:
        return Merged(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.uint64))
    rows = np.concatenate([np.asarray(c.rows, dtype=np.int64) for _, c in found])
    place = np.concatenate([np.arange(len(c.rows)) for _, c in found])
    source = np.concatenate([np.full(len(c.rows), number) for number, c in found])
    order = np.lexsort((source, place))
    distinct, first, group = np.unique(rows[order], return_index=True, return_inverse=True)
    bits = np.zeros(len(distinct), dtype=np.uint64)
    np.bitwise_or.at(bits, group, np.left_shift(np.uint64(1), source[order].astype(np.uint64)))
    best = np.argsort(first, kind="stable")[:limit]
    fallback = 1.0 / (1.0 + place[order][first[best]])
    return Merged(distinct[best], fallback.astype(np.float32), bits[best])
