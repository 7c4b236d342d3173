"""How often each id of a space occurs in the training split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class IdStatistics:
    """The ids of one space.

    fingerprints: int64 [V], ascending and distinct. counts: int64 [V], occurrences in the training split.
    """

    fingerprints: np.ndarray
    counts: np.ndarray

    @property
    def size(self) -> int:
        """V, the number of distinct ids."""
        return len(self.fingerprints)

    def rows(self, prints: Tensor) -> Tensor:
        """Positions of fingerprints int64 [*] in `fingerprints`, int64, same shape; -1 where unknown."""
        if not self.size:
            return torch.full_like(prints, -1)
        known = torch.as_tensor(self.fingerprints, device=prints.device)
        rows = torch.searchsorted(known, prints).clamp_(max=self.size - 1)
        return torch.where(known[rows] == prints, rows, -1)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """For safetensors: `<prefix>.fingerprints` and `<prefix>.counts`."""
        return {
            f"{prefix}.fingerprints": torch.as_tensor(self.fingerprints),
            f"{prefix}.counts": torch.as_tensor(self.counts),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        return cls(tensors[f"{prefix}.fingerprints"].numpy(), tensors[f"{prefix}.counts"].numpy())


class IdCounter:
    """Counts ids chunk by chunk; memory grows with the distinct ids, not with the rows."""

    def __init__(self) -> None:
        self._prints: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._merged = 0

    def add(self, prints: np.ndarray, counts: np.ndarray | None = None) -> None:
        """prints: int64 [n], any order, repeats allowed. counts: int64 [n] weights, default one each."""
        if counts is None:
            prints, counts = np.unique(prints, return_counts=True)
        self._prints.append(prints)
        self._counts.append(counts)
        if sum(map(len, self._prints[1:])) > max(self._merged, 1 << 20):  # so that merging stays linear
            self._merge()

    def _merge(self) -> None:
        prints, inverse = np.unique(np.concatenate(self._prints), return_inverse=True)
        # bincount adds in float64: exact up to 2**53 occurrences
        counts = np.bincount(inverse, weights=np.concatenate(self._counts), minlength=len(prints)).astype(np.int64)
        self._prints, self._counts, self._merged = [prints], [counts], len(prints)

    def statistics(self) -> IdStatistics:
        if not self._prints:
            return IdStatistics(np.empty(0, np.int64), np.empty(0, np.int64))
        self._merge()
        seen = self._counts[0] > 0
        return IdStatistics(self._prints[0][seen], self._counts[0][seen])
