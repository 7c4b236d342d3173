"""From a model's logits to probabilities that come true, kept in the bundle as three small tensors.

Every kind is one increasing piecewise linear map of the logit, then the sigmoid; so ranking by the calibrated
probability is ranking by the logit, with no plateaus on which candidates would tie.

* `isotonic`: pool adjacent violators (scikit-learn's) on the validation part; a block becomes one knot at its mean
  logit (centred isotonic regression, Oron and Flournoy 2017). Beyond the outermost knots the logit is only shifted.
* `platt`: sigmoid(a x + b) with a > 0 and Platt's smoothed targets (Platt 1999), for small validation parts.
* `none`: the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from engine.errors import BundleError
from engine.metrics import sigmoid

Kind = Literal["isotonic", "platt", "none"]
KINDS: tuple[Kind, ...] = ("isotonic", "platt", "none")

CLIP = 1e-7  # probabilities lie in [CLIP, 1 - CLIP]
_FAR = math.log((1 - CLIP) / CLIP)
_STEPS = 100
_LEAST_SLOPE = 1e-3  # of Platt's map, over logits that spread by one
PRIOR_ROWS = 2.0  # every isotonic block is shrunk as if it held two more rows of the mean label: no 0 and no 1


@dataclass(frozen=True)
class Calibration:
    """thresholds float32 [k] (logits, increasing), values float32 [k] (logits, increasing), slope beyond the ends."""

    kind: Kind = "none"
    thresholds: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    slope: float = 1.0

    @classmethod
    def fit(cls, logits: ArrayLike, labels: ArrayLike, kind: Kind, weight: ArrayLike | None = None) -> Self:
        """Learns from rows that the model did not train on. Labels of one class teach nothing: then `none`.

        logits [n] finite, labels [n] (positive where > 0.5), weight [n] > 0: how many rows each stands for; None: one.
        ValueError for other kinds and non-finite logits. Equal rows in equal order give equal maps, to the last bit.
        """
        if kind not in KINDS:
            raise ValueError(f"calibration '{kind}' is not one of {', '.join(KINDS)}")
        x = np.asarray(logits, dtype=np.float64).reshape(-1)
        y = (np.asarray(labels).reshape(-1) > 0.5).astype(np.float64)
        w = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=np.float64).reshape(-1)
        if not len(x) == len(y) == len(w):
            raise ValueError(f"{len(x)} logits but {len(y)} labels and {len(w)} weights")
        if not np.isfinite(x).all():
            raise ValueError("logits are not finite; the model has diverged (lower the learning rates)")
        if kind == "none" or not 0 < y.sum() < len(y):
            return cls()
        if kind == "platt":
            a, b = _platt(x, y, w)
            return cls("platt", np.array([0, 1], np.float32), np.array([b, a + b], np.float32), a)
        thresholds, values = _isotonic(x, y, w)
        return cls("isotonic", thresholds, values)

    @property
    def increasing(self) -> bool:
        """Whether it keeps the order of all logits, as it has to."""
        knots = self.thresholds.shape == self.values.shape and self.values.ndim == 1
        rising = knots and all(bool((np.diff(ends) > 0).all()) for ends in (self.thresholds, self.values))
        whole = all(bool(np.isfinite(ends).all()) for ends in (self.thresholds, self.values))
        return rising and whole and 0 < self.slope < math.inf

    def logits(self, logits: ArrayLike) -> np.ndarray:
        """Calibrated logits float64, same shape; strictly increasing in the logit."""
        x = np.asarray(logits, dtype=np.float64)
        if not len(self.thresholds):
            return x
        inside = np.minimum(np.maximum(x, self.thresholds[0]), self.thresholds[-1])
        return np.interp(inside, self.thresholds, self.values) + self.slope * (x - inside)

    def apply(self, logits: ArrayLike) -> np.ndarray:
        """Probabilities float32 in [1e-7, 1 - 1e-7], same shape; an array or a CPU tensor is fine."""
        if isinstance(logits, Tensor):
            logits = logits.detach().numpy()
        within = np.minimum(np.maximum(self.logits(logits), -_FAR), _FAR)
        return (1.0 / (1.0 + np.exp(-within))).astype(np.float32)

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """For safetensors; `kind` is its place in `KINDS`."""
        return {
            f"{prefix}kind": torch.tensor([KINDS.index(self.kind)]),
            f"{prefix}thresholds": torch.from_numpy(np.array(self.thresholds, np.float32)),
            f"{prefix}values": torch.from_numpy(np.array(self.values, np.float32)),
            f"{prefix}slope": torch.tensor([self.slope], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """What `to_tensors` gave. BundleError if the map is not increasing: it would change the ranking."""
        try:
            kind = KINDS[int(tensors[f"{prefix}kind"])]
            thresholds, values = (tensors[f"{prefix}{n}"].numpy() for n in ("thresholds", "values"))
            slope = float(tensors[f"{prefix}slope"])
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise BundleError(f"calibration '{prefix.rstrip('.')}' cannot be read: {error}") from error
        found = cls(kind, thresholds, values, slope)
        if not found.increasing:
            raise BundleError(f"calibration '{prefix.rstrip('.')}' is not an increasing map")
        return found

    def describe(self) -> dict[str, Any]:
        """For reports: the kind and how many knots it has."""
        return {"kind": self.kind, "knots": len(self.thresholds)}


def _isotonic(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots (logit, calibrated logit), both float32 and strictly increasing."""
    from sklearn.isotonic import isotonic_regression  # here, because it takes 70 MB and is for training alone

    points, code = np.unique(x, return_inverse=True)
    code = code.reshape(-1)
    rows, positives = np.bincount(code, w), np.bincount(code, w * y)
    level = isotonic_regression(positives / rows, sample_weight=rows)
    rate = float(positives.sum() / rows.sum())
    # shrinking may disorder neighbours, so a second pass over the blocks puts them in order again
    block = np.append(0, np.cumsum(np.diff(level) > 0))
    size, hit, centre = (np.bincount(block, w) for w in (rows, positives, rows * points))
    shrunk = isotonic_regression((hit + PRIOR_ROWS * rate) / (size + PRIOR_ROWS), sample_weight=size)
    merged = np.append(0, np.cumsum(np.diff(shrunk) > 0))
    thresholds = (np.bincount(merged, centre) / np.bincount(merged, size)).astype(np.float32)
    p = np.bincount(merged, shrunk * size) / np.bincount(merged, size)
    values = (np.log(p) - np.log1p(-p)).astype(np.float32)
    keep = np.append(True, (np.diff(thresholds) > 0) & (np.diff(values) > 0))  # float32 may merge neighbours
    return thresholds[keep], values[keep]


def _platt(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the maximum likelihood sigmoid with Platt's targets, by Newton's method with a line search
    (Lin, Lin and Weng 2007). Sums are numpy's, whose order does not depend on threads."""
    positives, whole = float((w * y).sum()), float(w.sum())
    target = np.where(y > 0, (positives + 1) / (positives + 2), 1 / (whole - positives + 2))
    middle, spread = float(x.mean()), float(x.std()) or 1.0
    z, share = (x - middle) / spread, w / whole

    def loss(at: np.ndarray) -> float:
        s = at[0] * z + at[1]
        return float((share * (np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s))) - target * s)).sum())

    at = np.array([1.0, math.log((positives + 1) / (whole - positives + 1))])
    here = loss(at)
    for _ in range(_STEPS):
        p = sigmoid(at[0] * z + at[1])
        error, curve = share * (p - target), share * p * (1 - p)
        slope = np.array([(error * z).sum(), error.sum()])
        cross = (curve * z).sum()
        bent = np.array([[(curve * z * z).sum(), cross], [cross, curve.sum()]]) + 1e-12 * np.eye(2)
        step = -np.linalg.solve(bent, slope)
        if at[0] + step[0] < _LEAST_SLOPE:  # the rows are ordered the wrong way round: then the offset alone
            step = np.array([_LEAST_SLOPE - at[0], -slope[1] / bent[1, 1]])
            slope[0] = 0.0 if at[0] == _LEAST_SLOPE else slope[0]
        if np.abs(slope).max() < 1e-9:
            break
        length, there = 1.0, loss(at + step)
        while there > here and length > 1e-6:
            length /= 2
            there = loss(at + length * step)
        at, here = at + length * step, there
    return float(at[0] / spread), float(at[1] - at[0] * middle / spread)
