"""Figures of merit over whole splits, vectorised in numpy; ties count half, as in scikit-learn.

Labels come first, then scores. A figure that the rows cannot give (one class only, no users, no rows) is None: it
means "undefined here", never zero, and prints as `null` in JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

EPS = 1e-7  # probabilities are clipped to [EPS, 1 - EPS] before a logarithm


def sigmoid(logits: ArrayLike) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow -> float64, same shape."""
    x = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative; None for one class.

    labels [n] (positive where > 0.5), scores [n], any monotone scale.
    """
    y, s = _pair(labels, scores)
    return _grouped(y, s, np.zeros(len(y), dtype=np.int64))


def gauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike | None) -> float | None:
    """AUC within each user, weighted by the user's impressions (Zhou et al. 2018, eq. 7).

    users [n]: int64 keys. Users with one class have no AUC and are left out. None without users, or if none remains.
    """
    if users is None:
        return None
    y, s = _pair(labels, scores)
    _, codes = np.unique(np.asarray(users), return_inverse=True)
    return _grouped(y, s, codes.reshape(-1))


def logloss(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Mean negative log likelihood in nats; probabilities clipped to [1e-7, 1 - 1e-7]. None without rows."""
    y, p = _pair(labels, probabilities)
    if not len(y):
        return None
    p = np.clip(p, EPS, 1 - EPS)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Log loss divided by that of always saying the mean label (He et al. 2014); below 1 is better than saying it.

    None where the labels are of one class (their entropy is zero).
    """
    y, p = _pair(labels, probabilities)
    rate = float(y.mean()) if len(y) else 0.0
    if not 0 < rate < 1:
        return None
    loss = logloss(y, p)
    assert loss is not None
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


@dataclass(frozen=True)
class CalibrationCurve:
    """Bins of about equal size, by predicted probability: mean predicted, share of positives, rows; each [bins]."""

    predicted: np.ndarray
    observed: np.ndarray
    rows: np.ndarray


def calibration_curve(labels: ArrayLike, probabilities: ArrayLike, bins: int = 20) -> CalibrationCurve:
    """Predicted against observed in at most `bins` bins of about equal rows; equal predictions share a bin."""
    y, p = _pair(labels, probabilities)
    if not len(y):
        return CalibrationCurve(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))
    ordered = np.sort(p)
    cuts = np.unique(ordered[np.arange(1, bins) * len(y) // bins])
    place = np.searchsorted(cuts, p, side="right")
    rows = np.bincount(place, minlength=len(cuts) + 1)
    used = rows > 0
    predicted = np.bincount(place, p, len(cuts) + 1)[used] / rows[used]
    observed = np.bincount(place, y, len(cuts) + 1)[used] / rows[used]
    return CalibrationCurve(predicted, observed, rows[used].astype(np.int64))


def ece(labels: ArrayLike, probabilities: ArrayLike, bins: int = 20) -> float | None:
    """Expected calibration error: mean |predicted - observed| over bins of equal rows, weighted by rows.

    Bins of equal rows, not equal width, so that rare clicks are not all in one bin. None without rows.
    """
    curve = calibration_curve(labels, probabilities, bins)
    total = int(curve.rows.sum())
    if not total:
        return None
    return float(np.sum(curve.rows * np.abs(curve.predicted - curve.observed)) / total)


def rel_impr(value: float | None, base: float | None) -> float | None:
    """RelaImpr of an AUC over a baseline's: (value - .5) / (base - .5) - 1 (Zhou et al. 2018, eq. 8).

    None where either is undefined or the baseline is .5 itself.
    """
    if value is None or base is None or base == 0.5:
        return None
    return (value - 0.5) / (base - 0.5) - 1.0


# ----------------------------------------------------------------------------------------- ranked lists
def hits(ranked: ArrayLike, query_of: ArrayLike, relevant: ArrayLike) -> np.ndarray:
    """Which places of Q ranked lists hold a relevant item -> bool [Q, K].

    ranked: int64 [Q, K] items, best first, negative where the list is shorter. The P relevant pairs: query_of int64
    [P] in [0, Q) and relevant int64 [P] items.
    """
    lists = np.asarray(ranked, dtype=np.int64)
    queries, items = np.asarray(query_of, dtype=np.int64), np.asarray(relevant, dtype=np.int64)
    if not lists.size or not items.size:
        return np.zeros(lists.shape, dtype=bool)
    distinct, codes = np.unique(items, return_inverse=True)
    place = np.minimum(np.searchsorted(distinct, lists), len(distinct) - 1)
    known = (distinct[place] == lists) & (lists >= 0)
    keys = np.arange(len(lists), dtype=np.int64)[:, None] * len(distinct) + place
    return known & np.isin(keys, queries * len(distinct) + codes.reshape(-1))


def recall_at(hit: ArrayLike, relevant_count: ArrayLike, k: int) -> float | None:
    """Mean over queries of (relevant among the first k) / (relevant at all).

    hit: bool [Q, K] from `hits`; relevant_count: int64 [Q]. Queries with nothing relevant are left out; None if all.
    """
    h, n = _lists(hit, relevant_count)
    return None if not len(n) else float(np.mean(h[:, :k].sum(axis=1) / n))


def ndcg_at(hit: ArrayLike, relevant_count: ArrayLike, k: int) -> float | None:
    """Mean over queries of the discounted gain of the first k over the best possible, gain 1, discount log2(place + 1).

    hit: bool [Q, K] from `hits`; relevant_count: int64 [Q]. Queries with nothing relevant are left out; None if all.
    """
    h, n = _lists(hit, relevant_count)
    if not len(n):
        return None
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gain = h[:, :k] @ discount[: h[:, :k].shape[1]]
    best = np.cumsum(discount)[np.minimum(n, k) - 1]
    return float(np.mean(gain / best))


def mrr(hit: ArrayLike, relevant_count: ArrayLike) -> float | None:
    """Mean over queries of 1 / (place of the first relevant item), 0 if it is not in the list.

    hit: bool [Q, K] from `hits`; relevant_count: int64 [Q]. Queries with nothing relevant are left out; None if all.
    """
    h, n = _lists(hit, relevant_count)
    if not len(n):
        return None
    if not h.shape[1]:
        return 0.0
    return float(np.mean(np.where(h.any(axis=1), 1.0 / (h.argmax(axis=1) + 1.0), 0.0)))


# ---------------------------------------------------------------------------------------------- helpers
def _pair(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(labels, dtype=np.float64).reshape(-1)
    s = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(y) != len(s):
        raise ValueError(f"{len(y)} labels but {len(s)} scores")
    return y, s


def _lists(hit: ArrayLike, relevant_count: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    h, n = np.asarray(hit, dtype=bool), np.asarray(relevant_count, dtype=np.int64).reshape(-1)
    if h.ndim != 2 or len(h) != len(n):
        raise ValueError(f"hits of shape {h.shape} do not fit {len(n)} queries")
    return h[n > 0], n[n > 0]


def _grouped(y: np.ndarray, s: np.ndarray, group: np.ndarray) -> float | None:
    """Rank-sum AUC in each group (codes from 0), averaged by rows over the groups of both classes; None without any.

    Sorted by (group, score), equal scores of a group share their mean rank; the sum of the positives' ranks gives
    Mann-Whitney's U. No loop over groups.
    """
    if not len(y) or np.isnan(s).any():
        return None
    order = np.lexsort((s, group)) if group.any() else np.argsort(s)  # of one group seven times quicker
    g, v, positive = group[order], s[order], y[order] > 0.5
    new = np.empty(len(g), dtype=bool)
    new[0] = True
    new[1:] = (g[1:] != g[:-1]) | (v[1:] != v[:-1])
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    length = np.diff(np.append(first, len(g)))
    count = np.bincount(group)
    start = np.cumsum(count) - count
    rank = (first + (length - 1) / 2.0)[run] - start[g] + 1.0
    positives = np.bincount(g, positive, len(count))
    negatives = count - positives
    pairs = positives * negatives
    above = np.bincount(g, rank * positive, len(count)) - positives * (positives + 1) / 2
    usable = pairs > 0
    return float(np.average(above[usable] / pairs[usable], weights=count[usable])) if usable.any() else None
