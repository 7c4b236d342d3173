"""Numbers to what a network can read: standard scores, log scores or quantile bins, fitted on the training split.

A missing value (null, NaN, infinite) is the mean, that is 0 after scaling; among bins it has an id of its own, the same
as any missing id. Values are rounded to float32 first, so that the same number gives the same bin offline and online.
A score further than `FAR` from 0 counts as that: an absurd number must not make the network's sums infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from engine.hashing import fingerprint
from engine.schema import FeatureSpec

FAR = 1e4
"""Standard deviations. Of n values none lies further than sqrt(n) from their mean, so training meets no limit here."""
SAMPLE = 1 << 20
"""Values a feature that quantiles are computed from; all of them where there are fewer."""


@dataclass(frozen=True)
class Transform:
    """One feature: a scale (log1p of the magnitude first if `log`), or bins with edges float64 [k] and ids [k + 2]."""

    log: bool = False
    mean: float = 0.0
    std: float = 1.0
    edges: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """float32 [n] with NaN as missing -> float32 [n] scores, or int64 [n] fingerprints of bins."""
        present = np.isfinite(values)
        if self.edges is None:
            wide = values.astype(np.float64)
            score = ((_log(wide) if self.log else wide) - self.mean) / self.std
            return np.where(present, np.clip(score, -FAR, FAR), 0.0).astype(np.float32)
        assert self.ids is not None
        bins = np.searchsorted(self.edges, values, side="right")
        return self.ids[np.where(present, bins, len(self.edges) + 1)]


def _log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|): log1p that also takes the few negative counts that real logs hold."""
    return np.copysign(np.log1p(np.abs(values)), values)


def _binned(edges: np.ndarray) -> Transform:
    ids = [fingerprint(i) for i in range(len(edges) + 1)] + [fingerprint("")]
    return Transform(edges=edges, ids=np.array(ids, dtype=np.int64))


class NumericTransforms:
    """The fitted transform of each numeric feature."""

    def __init__(self, transforms: Mapping[str, Transform] | None = None) -> None:
        self._transforms = dict(transforms or {})

    def __getitem__(self, feature: str) -> Transform:
        return self._transforms[feature]

    def __contains__(self, feature: str) -> bool:
        return feature in self._transforms

    @classmethod
    def fit(cls, chunks: Mapping[str, Iterable[np.ndarray]], features: Iterable[FeatureSpec], rows: int) -> Self:
        """Fits numeric features on float32 chunks of the training split; `rows` is how many values each brings.

        Two statistics in one pass (Chan et al. 1983); quantiles from every `rows // SAMPLE`-th value.
        """
        return cls({f.name: _fit(f, chunks[f.name], rows) for f in features})

    def to_tensors(self, prefix: str = "numeric") -> dict[str, Tensor]:
        """For safetensors: `<prefix>.<feature>.scale` (log, mean, std) or `<prefix>.<feature>.edges`, float64."""
        tensors = {}
        for name, t in self._transforms.items():
            if t.edges is None:
                tensors[f"{prefix}.{name}.scale"] = torch.tensor([float(t.log), t.mean, t.std], dtype=torch.float64)
            else:
                tensors[f"{prefix}.{name}.edges"] = torch.as_tensor(t.edges, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "numeric") -> Self:
        transforms = {}
        for key, value in tensors.items():
            if not key.startswith(f"{prefix}."):
                continue
            name, _, what = key.removeprefix(f"{prefix}.").rpartition(".")
            if what == "edges":
                transforms[name] = _binned(value.numpy().astype(np.float64))
            else:
                log, mean, std = value.tolist()
                transforms[name] = Transform(log=bool(log), mean=mean, std=std)
        return cls(transforms)


def _fit(feature: FeatureSpec, chunks: Iterable[np.ndarray], rows: int) -> Transform:
    if feature.transform == "bins":
        return _binned(_edges(chunks, feature.bins, max(1, -(-rows // SAMPLE))))
    log = feature.transform == "log"
    count, mean, square = 0, 0.0, 0.0
    for chunk in chunks:
        values = chunk[np.isfinite(chunk)].astype(np.float64)
        if not len(values):
            continue
        values = _log(values) if log else values
        total = count + len(values)
        delta = float(values.mean()) - mean
        square += float(((values - values.mean()) ** 2).sum()) + delta * delta * count * len(values) / total
        mean += delta * len(values) / total
        count = total
    std = float(np.sqrt(square / count)) if count else 0.0
    return Transform(log=log, mean=mean, std=std if std > 1e-12 * max(1.0, abs(mean)) else 1.0)


def _edges(chunks: Iterable[np.ndarray], bins: int, stride: int) -> np.ndarray:
    """Distinct inner quantiles, at most bins - 1 of them, float64 ascending."""
    kept, seen = [], 0
    for chunk in chunks:
        kept.append(chunk[(-seen) % stride :: stride])
        seen += len(chunk)
    values = np.concatenate(kept) if kept else np.empty(0, np.float32)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.empty(0, np.float64)
    quantiles = np.quantile(values, np.arange(1, bins) / bins, method="higher")
    return np.unique(quantiles.astype(np.float64))
