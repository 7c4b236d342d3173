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
PRIOR_ROWS = 2.0  # every isotonic block is shrunk as if it held two more rows of the mean label: no 0 and no 1


@dataclass(frozen=True)
class Calibration:
    """thresholds float32 [k] (logits, increasing), values float32 [k] (logits, increasing), slope beyond the ends."""

    kind: Kind = "none"
    thresholds: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    slope: float = 1.0

    @classmethod
    def fit(cls, logits: ArrayLike, labels: ArrayLike, kind: Kind) -> Self:
        """Learns from rows that the model did not train on. Labels of one class teach nothing: then `none`.

        logits [n] finite, labels [n] (positive where > 0.5). ValueError for other kinds and non-finite logits.
        """
        if kind not in KINDS:
            raise ValueError(f"calibration '{kind}' is not one of {', '.join(KINDS)}")
        x = np.asarray(logits, dtype=np.float64).reshape(-1)
        y = (np.asarray(labels).reshape(-1) > 0.5).astype(np.float64)
        if len(x) != len(y):
            raise ValueError(f"{len(x)} logits but {len(y)} labels")
        if not np.isfinite(x).all():
            raise ValueError("logits are not finite; the model has diverged (lower the learning rates)")
        if kind == "none" or not 0 < y.sum() < len(y):
            return cls()
        if kind == "platt":
            a, b = _platt(x, y)
            return cls("platt", np.array([0, 1], np.float32), np.array([b, a + b], np.float32), a)
        thresholds, values = _isotonic(x, y)
        return cls("isotonic", thresholds, values)

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
        rising = slope > 0 and thresholds.shape == values.shape and bool((np.diff(thresholds) > 0).all())
        if not (rising and bool((np.diff(values) > 0).all()) and np.isfinite(values).all()):
            raise BundleError(f"calibration '{prefix.rstrip('.')}' is not an increasing map")
        return cls(kind, thresholds, values, slope)

    def describe(self) -> dict[str, Any]:
        """For reports: the kind and how many knots it has."""
        return {"kind": self.kind, "knots": len(self.thresholds)}


def _isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots (logit, calibrated logit), both float32 and strictly increasing."""
    from sklearn.isotonic import isotonic_regression  # here, because it takes 70 MB and is for training alone

    points, code, rows = np.unique(x, return_inverse=True, return_counts=True)
    code = code.reshape(-1)
    positives = np.bincount(code, y)
    level = isotonic_regression(positives / rows, sample_weight=rows)
    rate = float(y.mean())
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


def _platt(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the maximum likelihood sigmoid with Platt's targets."""
    from scipy.optimize import minimize

    positives = y.sum()
    target = np.where(y > 0, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
    spread = float(x.std()) or 1.0
    z = x / spread

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        s = ab[0] * z + ab[1]
        error = sigmoid(s) - target
        return float(np.mean(np.logaddexp(0, s) - target * s)), np.array([np.mean(error * z), np.mean(error)])

    fit = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-3, None), (None, None)])
    return float(fit.x[0] / spread), float(fit.x[1])
