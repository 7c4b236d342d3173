"""What a model has to beat: the mean label, and each item's own mean; and how often training saw whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from engine import metrics
from engine.data.statistics import IdCounter, IdStatistics

if TYPE_CHECKING:
    from engine.data.prepared import Prepared
    from engine.training.evaluation import Predictions

PRIOR_ROWS = 10.0
"""An item's mean counts as if it had been shown ten more times at the mean label."""


@dataclass(frozen=True)
class TrainingCounts:
    """Impressions and positives an item, impressions a user, in the training split."""

    rate: float
    impressions: IdStatistics
    positives: IdStatistics
    users: IdStatistics

    @classmethod
    def of(cls, prepared: Prepared) -> Self:
        """One pass over the labels and keys of the training split."""
        impressions, positives, users = IdCounter(), IdCounter(), IdCounter()
        for labels, user, item in prepared.outcomes("train"):
            if item is not None:
                impressions.add(item)
                positives.add(item[labels > 0.5])
            if user is not None:
                users.add(user)
        return cls(prepared.label_rate, impressions.statistics(), positives.statistics(), users.statistics())

    def item_mean(self, items: np.ndarray) -> np.ndarray:
        """Probability of a positive from the item alone: items int64 [n] keys -> float64 [n], smoothed."""
        hits, rows = counts(self.positives, items), counts(self.impressions, items)
        return (hits + PRIOR_ROWS * self.rate) / (rows + PRIOR_ROWS)


def counts(statistics: IdStatistics, keys: np.ndarray) -> np.ndarray:
    """How often each key was counted: int64 [n] -> int64 [n], 0 where never."""
    rows = statistics.rows(torch.from_numpy(np.array(keys, dtype=np.int64))).numpy()
    return np.where(rows >= 0, np.append(statistics.counts, 0)[rows], 0)


def baselines(seen: TrainingCounts, rows: Predictions, task: str) -> dict[str, dict[str, float | None]]:
    """name -> auc, gauc, logloss, ne, ece on the rows that the model was judged by.

    `item_mean` (popularity: the same order for everyone) is left out where rows have no item.
    """
    found = {"mean_label": _figures(rows, task, np.full(len(rows), seen.rate))}
    if rows.item_key is not None:
        found["item_mean"] = _figures(rows, task, seen.item_mean(rows.item_key))
    return found


def _figures(rows: Predictions, task: str, probabilities: np.ndarray) -> dict[str, float | None]:
    y = rows.labels[task]
    return {
        "auc": metrics.auc(y, probabilities),
        "gauc": metrics.gauc(y, probabilities, rows.user_key),
        "logloss": metrics.logloss(y, probabilities),
        "ne": metrics.normalised_entropy(y, probabilities),
        "ece": metrics.ece(y, probabilities),
    }
