"""Progressive validation: every example is judged by the model before it is trained on it (Blum et al. 1999).

Figures are kept over a window of the newest examples and since the start, for the model that learns and, on the same
rows, for the bundle that it began with. Corrections (a late positive of a row that was a negative) are counted but
not judged: their row was judged already. Presumed negatives are judged when they are known: as positives, or settled
at their window's end; the model was trained on the presumption before. Where negatives are thinned at rate r, each
stands for 1 / r of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine import metrics
from engine.batch import Batch
from engine.errors import CheckpointError
from engine.streaming.join.emitted import CORRECTION, judged

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.plugins import Plugins

RECENT = (64, 128, 256, 512)
"""Newest examples whose losses are told on their own, so that a model that breaks is seen at once."""

BLOCKS = 32
"""Of consecutive rows, whose sums standard errors are taken from: a user's rows lie together, and are alike."""

BINS = 4096
"""Of the logit, in the AUC since the start; within a bin scores count as ties."""
_FAR = math.log((1 - metrics.EPS) / metrics.EPS)

_POINT = ("auc", "logloss", "ne", "calibration", "base_auc", "base_logloss", "base_ne", "base_calibration",
          "total_auc", "total_base_auc")  # fmt: skip


class FrozenBase:
    """The bundle that a learner began with, as it was: what learning has to beat on the same rows."""

    def __init__(self, bundle: Bundle, plugins: Plugins) -> None:
        self._model = bundle.model(plugins)
        self._calibration = bundle.calibration
        self._tasks = bundle.schema.tasks

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> np.ndarray:
        """Calibrated probabilities, float32 [N, tasks]."""
        logits = self._model(batch)
        return np.stack([self._calibration[t].apply(logits[t]) for t in self._tasks], axis=1)


class ProgressiveValidation:
    """Rolling and cumulative figures of merit.

    window: newest examples that the rolling figures are of. every: examples between two points of the curve (a quarter
    of the window where None); points: most of them; a curve that is full keeps every second point, and doubles `every`.
    """

    def __init__(self, tasks: Sequence[str], window: int, *, every: int | None = None, points: int = 1000) -> None:
        if not tasks or window < 1 or points < 2:
            raise ValueError("progressive validation needs a task, a window of 1 example and 2 points or more")
        self.tasks = tuple(tasks)
        self.window = window
        self._every = max(1, window // 4 if every is None else every)
        self._points = points
        count = len(self.tasks)
        self._labels = np.full((window, count), np.nan, np.float32)
        self._live = np.full((window, count), np.nan, np.float32)
        self._base = np.full((window, count), np.nan, np.float32)
        self._weight = np.zeros(window, np.float32)
        self._next, self._held = 0, 0
        self._total, self._corrections, self._newest = 0, 0, math.nan
        self._sums = _Sums(count)
        self._curve = np.empty((0, 2 + count * len(_POINT)), np.float64)
        self._known: dict[str, Any] | None = None

    def observe(
        self,
        labels: np.ndarray,
        probability: np.ndarray,
        base: np.ndarray | None,
        weight: np.ndarray,
        seconds: np.ndarray,
        kind: np.ndarray,
    ) -> None:
        """Takes n examples as they were judged before training.

        labels float32 [n, tasks], NaN where a task says nothing; probability and base float32 [n, tasks], of the model
        that learns and of the frozen bundle (None: there is none to compare with); weight float32 [n], how many
        examples each stands for (1 / r where it is one of the negatives that rate r left); seconds float64 [n] of
        event time; kind int8 [n], as in `Emitted`.
        """
        told = judged(np.asarray(kind))
        count = int(told.sum())
        self._corrections += int((np.asarray(kind) == CORRECTION).sum())
        if not count:
            return
        y = np.asarray(labels, np.float32)[told]
        p = np.asarray(probability, np.float32)[told]
        b = np.full_like(p, np.nan) if base is None else np.asarray(base, np.float32)[told]
        w = np.asarray(weight, np.float32)[told]
        if not y.shape == p.shape == b.shape == (count, len(self.tasks)) or w.shape != (count,):
            raise ValueError(f"labels {y.shape}, probability {p.shape}, base {b.shape}, weight {w.shape} do not fit")
        self._sums.add(y, p, b, w)
        kept = slice(max(0, count - self.window), count)
        places = (self._next + np.arange(kept.stop - kept.start)) % self.window
        self._labels[places], self._live[places], self._base[places] = y[kept], p[kept], b[kept]
        self._weight[places] = w[kept]
        self._next = int((places[-1] + 1) % self.window)
        self._held = min(self.window, self._held + count)
        self._newest = float(np.fmax(self._newest, np.max(seconds[told])))
        before, self._total = self._total, self._total + count
        self._known = None
        if before // self._every != self._total // self._every:
            self._add_point()

    def clear(self) -> None:
        """Empties the window, after the model was put back to an earlier one; what is since the start stays."""
        self._next, self._held, self._known = 0, 0, None

    def figures(self) -> dict[str, Any]:
        """What JSON can hold; None where the rows cannot tell (one class only, no base).

        `examples` and `corrections` since the start, `window` examples in the window, `seconds` of the newest event;
        `tasks`: task -> over the window `examples`, `positives`, `not_finite` (judged as no number), `auc`,
        `logloss`, `ne`, `calibration` (predicted over observed positives), `base` (the same of the frozen bundle, or
        None), `auc_gain` over the base with its standard error `auc_error`, `excess` log loss over the base with its
        standard error `excess_error`, `recent` (of the newest 64, 128, 256 and 512 examples `examples`, `positives`,
        `base_logloss`, `excess` and `excess_error`), and `since_start`.

        Weights count in log loss, entropy and calibration. AUC is of the rows as they are: thinning negatives at random
        leaves its expectation as it is.
        """
        if self._known is None:
            rows = self._rows(self._held)
            self._known = {
                "examples": self._total,
                "corrections": self._corrections,
                "window": self._held,
                "seconds": None if math.isnan(self._newest) else self._newest,
                "tasks": {task: self._task(j, rows) for j, task in enumerate(self.tasks)},
            }
        return self._known

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Points for plotting, oldest first: `examples`, `seconds` (event time) and `tasks`: task -> the rolling `auc`,
        `logloss`, `ne`, `calibration`, those of the base with `base_` before, and the AUC since the start, `total_auc`
        and `total_base_auc`."""
        points = []
        for row in self._curve:
            values = [None if math.isnan(v) else v for v in row.tolist()]
            per_task = np.array(values[2:], dtype=object).reshape(len(self.tasks), len(_POINT)).tolist()
            named = {t: dict(zip(_POINT, v, strict=True)) for t, v in zip(self.tasks, per_task, strict=True)}
            points.append({"examples": int(row[0]), "seconds": values[1], "tasks": named})
        return points

    def state(self) -> dict[str, np.ndarray]:
        """All of it, for a checkpoint."""
        numbers = [self._next, self._held, self._total, self._corrections, self._every]
        return {
            "numbers": np.array(numbers, np.int64),
            "newest": np.array([self._newest], np.float64),
            "labels": self._labels.copy(),
            "live": self._live.copy(),
            "base": self._base.copy(),
            "weight": self._weight.copy(),
            "curve": self._curve.copy(),
            **self._sums.state(),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from there exactly. CheckpointError where the state is of other tasks or another window."""
        mine = self.state()
        for name, value in mine.items():
            if name not in state:
                raise CheckpointError(f"progressive validation: '{name}' is missing in the checkpoint")
            found, wanted = state[name].shape, value.shape
            if found[name == "curve" :] != wanted[name == "curve" :]:
                raise CheckpointError(
                    f"progressive validation: '{name}' is {list(found)} in the checkpoint, {list(wanted)} is wanted: "
                    "learning.guard.window or the tasks were changed; begin anew, or change them back"
                )
        self._next, self._held, self._total, self._corrections, self._every = state["numbers"].tolist()
        self._newest = float(state["newest"][0])
        self._labels, self._live = state["labels"].copy(), state["live"].copy()
        self._base, self._weight = state["base"].copy(), state["weight"].copy()
        self._curve = state["curve"].copy()
        self._sums.load(state)
        self._known = None

    # -------------------------------------------------------------------------------------------- the window
    def _rows(self, newest: int) -> np.ndarray:
        """Places of the newest examples, oldest of them first."""
        return (self._next - newest + np.arange(newest)) % self.window

    def _columns(self, j: int, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Labels, live and base probabilities, weights of the rows that a task speaks of, float64."""
        rows = rows[np.isfinite(self._labels[rows, j])]
        columns = (self._labels[rows, j], self._live[rows, j], self._base[rows, j], self._weight[rows])
        return tuple(c.astype(np.float64) for c in columns)

    def _task(self, j: int, rows: np.ndarray) -> dict[str, Any]:
        y, p, b, w = self._columns(j, rows)
        fit = np.isfinite(p)
        lost = len(p) - int(fit.sum())
        y, p, b, w = y[fit], p[fit], b[fit], w[fit]
        both = len(b) > 0 and bool(np.isfinite(b).all())
        found: dict[str, Any] = {"examples": len(y), "positives": int((y > 0.5).sum()), "not_finite": lost}
        found |= _merit(y, p, w)
        found["base"] = _merit(y, b, w) if both else None
        gain, gain_error, excess, excess_error = _gained(y, p, b, w) if both else (None,) * 4
        found |= {"auc_gain": gain, "auc_error": gain_error, "excess": excess, "excess_error": excess_error}
        found["recent"] = [_recent(y[-n:], p[-n:], b[-n:], w[-n:]) for n in RECENT if both and len(y) >= n]
        found["since_start"] = self._sums.figures(j)
        return found

    def _add_point(self) -> None:
        rows = self._rows(self._held)
        values: list[float | None] = [float(self._total), self._newest]
        for j in range(len(self.tasks)):
            y, p, b, w = self._columns(j, rows)
            fit = np.isfinite(p)
            live, base = (_merit(y[fit], s[fit], w[fit]) for s in (p, b))
            total = self._sums.figures(j)
            values += [*live.values(), *base.values(), total["auc"], (total["base"] or {}).get("auc")]
        row = np.array([[np.nan if v is None else v for v in values]], np.float64)
        self._curve = np.concatenate([self._curve, row])
        if len(self._curve) >= self._points:
            self._curve, self._every = self._curve[1::2], 2 * self._every


class _Sums:
    """What the figures since the start follow from, float64: a histogram of the logits by class, and sums.

    scores [tasks, 2 (live, base), 2 (negative, positive), BINS], rows as they are; sums [tasks, 2, 5]: examples,
    weight, weighted label, probability and loss.
    """

    def __init__(self, tasks: int) -> None:
        self._scores = np.zeros((tasks, 2, 2, BINS), np.float64)
        self._sums = np.zeros((tasks, 2, 5), np.float64)

    def add(self, labels: np.ndarray, live: np.ndarray, base: np.ndarray, weight: np.ndarray) -> None:
        for j in range(labels.shape[1]):
            for which, probability in enumerate((live[:, j], base[:, j])):
                told = np.isfinite(labels[:, j]) & np.isfinite(probability)
                y, p = labels[told, j].astype(np.float64), probability[told].astype(np.float64)
                w = weight[told].astype(np.float64)
                clipped = np.clip(p, metrics.EPS, 1 - metrics.EPS)
                place = (np.log(clipped / (1 - clipped)) + _FAR) * (BINS / (2 * _FAR))
                cell = np.clip(place.astype(np.int64), 0, BINS - 1) + BINS * (y > 0.5)
                self._scores[j, which] += np.bincount(cell, minlength=2 * BINS).reshape(2, BINS)
                self._sums[j, which] += [len(y), w.sum(), w @ y, w @ p, w @ losses(y, p)]

    def figures(self, j: int) -> dict[str, Any]:
        live = self._figures(j, 0)
        base = self._figures(j, 1)
        return {**live, "base": base if base["examples"] == live["examples"] > 0 else None}

    def _figures(self, j: int, which: int) -> dict[str, Any]:
        negative, positive = self._scores[j, which]
        count, weight, observed, predicted, loss = self._sums[j, which].tolist()
        pairs = negative.sum() * positive.sum()
        below = np.cumsum(negative) - negative / 2  # ties count half
        mean = loss / weight if weight else None
        entropy = _entropy(observed / weight) if weight else 0.0
        return {
            "examples": int(count),
            "positives": int(positive.sum()),
            "auc": float(positive @ below / pairs) if pairs else None,
            "logloss": mean,
            "ne": mean / entropy if mean is not None and entropy else None,
            "calibration": predicted / observed if observed else None,
        }

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self._scores.copy(), "sums": self._sums.copy()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self._scores, self._sums = state["scores"].copy(), state["sums"].copy()


# ------------------------------------------------------------------------------------------------- figures
def losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each row in nats, float64 [n]; probabilities clipped to [1e-7, 1 - 1e-7]."""
    p = np.clip(probabilities, metrics.EPS, 1 - metrics.EPS)
    return -(labels * np.log(p) + (1 - labels) * np.log1p(-p))


def _entropy(rate: float) -> float:
    """Of a coin, in nats."""
    return -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if 0 < rate < 1 else 0.0


def _merit(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> dict[str, float | None]:
    """auc, logloss, ne and calibration of rows; None without rows, or where a probability is no number."""
    whole = float(w.sum())
    if not whole or not np.isfinite(p).all():
        return dict.fromkeys(("auc", "logloss", "ne", "calibration"))
    observed = float(w @ y)
    loss, entropy = float(w @ losses(y, p)) / whole, _entropy(observed / whole)
    return {
        "auc": metrics.auc(y, p),
        "logloss": loss,
        "ne": loss / entropy if entropy else None,
        "calibration": float(w @ p) / observed if observed else None,
    }


def _mean(values: np.ndarray, weight: np.ndarray) -> tuple[float | None, float | None]:
    """A weighted mean and its standard error; None without rows."""
    whole = float(weight.sum())
    if not whole:
        return None, None
    mean = float(weight @ values) / whole
    return mean, _error(weight * (values - mean) / whole)


def _error(influence: np.ndarray) -> float:
    """Standard error of an estimate, of how much each row moves it (their sum is 0), by sums of consecutive rows."""
    blocks = min(BLOCKS, len(influence))
    if blocks < 2:
        return 0.0
    sums = np.add.reduceat(influence, np.arange(blocks) * len(influence) // blocks)
    return math.sqrt(float(sums @ sums) * blocks / (blocks - 1))


def _gained(y: np.ndarray, p: np.ndarray, b: np.ndarray, w: np.ndarray) -> tuple[float | None, ...]:
    """AUC over the base's with its standard error (paired, as in DeLong et al. 1988), and log loss likewise.

    A positive's placement is the share of negatives below it; AUC is the mean placement, and a row moves the difference
    of two AUCs by that of its placements.
    """
    excess, excess_error = _mean(losses(y, p) - losses(y, b), w)
    positive = y > 0.5
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        return None, None, excess, excess_error
    above = _placements(p[positive], p[~positive]) - _placements(b[positive], b[~positive])
    below = _placements(-p[~positive], -p[positive]) - _placements(-b[~positive], -b[positive])
    influence = np.empty(m + n)
    influence[positive], influence[~positive] = (above - above.mean()) / m, (below - below.mean()) / n
    return float(above.mean()), _error(influence), excess, excess_error


def _recent(y: np.ndarray, p: np.ndarray, b: np.ndarray, w: np.ndarray) -> dict[str, Any]:
    ours, theirs = losses(y, p), losses(y, b)
    excess, error = _mean(ours - theirs, w)
    level, positives = _mean(theirs, w)[0], int((y > 0.5).sum())
    return {
        "examples": len(y), "positives": positives, "base_logloss": level, "excess": excess, "excess_error": error,
    }  # fmt: skip


def _placements(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of ours the share of theirs that lies below it, ties half."""
    ordered, order = np.sort(theirs), np.argsort(ours)
    asked = ours[order]  # neighbours that are asked for together are found quicker
    found = np.empty(len(ours))
    found[order] = (np.searchsorted(ordered, asked, "left") + np.searchsorted(ordered, asked, "right")) / 2
    return found / len(ordered)
