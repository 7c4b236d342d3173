"""Have the features moved away from what the model was trained on? Population stability index a feature.

A bundle keeps a reference: how the training rows' values fall into buckets. What comes by the stream is counted in the
same buckets; the index compares the two distributions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.data.encoding import MISSING
from engine.errors import BundleError, CheckpointError
from engine.schema import Schema

if TYPE_CHECKING:
    from engine.data.prepared import Prepared

BUCKETS = 64
"""Of ids, by the low bits of the fingerprint; one more holds missing ids, and rows of a jagged feature without any."""
SAMPLE = 200_000
"""Training rows that the reference is counted from, evenly spaced in time."""
LEAST = 2_000
"""Examples without which no index is told: chance alone would make it large."""
SHIFTED, DRIFTED = 0.1, 0.25
"""Customary limits: below the first nothing moved to speak of, above the second the feature is another one."""

_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Reference:
    """How training rows fall into buckets.

    rows: training rows counted. counts: feature -> int64 [buckets], the last of them missing values.
    edges: dense feature -> float32 [k] inner deciles of the scaled values, ascending, for its k + 2 buckets.
    """

    rows: int
    counts: Mapping[str, np.ndarray]
    edges: Mapping[str, np.ndarray]

    def to_tensors(self) -> dict[str, Tensor]:
        """For safetensors: `rows`, `<feature>:counts` and `<feature>:edges`."""
        tensors = {"rows": torch.tensor([self.rows])}
        tensors |= {f"{name}:counts": torch.from_numpy(np.array(c)) for name, c in self.counts.items()}
        return tensors | {f"{name}:edges": torch.from_numpy(np.array(e)) for name, e in self.edges.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], schema: Schema) -> Self:
        """What `to_tensors` gave. BundleError names what does not fit the schema."""

        def taken(name: str, dtype: torch.dtype) -> np.ndarray:
            tensor = tensors.get(name)
            if tensor is None or tensor.dim() != 1 or tensor.dtype != dtype:
                raise BundleError(f"drift.safetensors: no {dtype} tensor '{name}' of one dimension")
            return tensor.numpy()

        edges = {f.name: taken(f"{f.name}:edges", torch.float32) for f in schema.dense}
        counts = {f.name: taken(f"{f.name}:counts", torch.int64) for f in schema.features}
        for name, its in counts.items():
            if len(its) != (len(edges[name]) + 2 if name in edges else BUCKETS + 1) or (its < 0).any():
                raise BundleError(f"drift.safetensors: '{name}:counts' has not one count a bucket")
            if name in edges and not (np.diff(edges[name]) > 0).all():
                raise BundleError(f"drift.safetensors: '{name}:edges' does not ascend")
        return cls(int(taken("rows", torch.int64).sum()), counts, edges)


def reference(prepared: Prepared) -> Reference:
    """Counts the training split, or `SAMPLE` rows of it."""
    schema = prepared.schema
    edges: dict[str, np.ndarray] = {}
    if schema.dense:
        columns = [_numbers(batch, schema) for batch in _sampled(prepared)]
        edges = {name: _deciles(np.concatenate([c[name] for c in columns])) for name in columns[0]} if columns else {}
        edges = {f.name: edges.get(f.name, np.empty(0, np.float32)) for f in schema.dense}
    empty = {f.name: np.zeros(len(edges[f.name]) + 2 if f.is_dense else BUCKETS + 1) for f in schema.features}
    for batch in _sampled(prepared):
        for name, its in _counts(batch, schema, edges, np.ones(batch.targets)).items():
            empty[name] += its
    rows = min(prepared.rows["train"], SAMPLE)
    return Reference(rows, {name: its.astype(np.int64) for name, its in empty.items()}, edges)


class Drift:
    """Counts what the stream brings, in two blocks of `window` examples: the last whole one, and the one being filled.

    The index is of both together, so of the newest `window` to 2 x `window` examples.
    """

    def __init__(self, reference: Reference, schema: Schema, window: int = 100_000) -> None:
        self.reference = reference
        self.window = max(window, LEAST)
        self._schema = schema
        self._names = list(reference.counts)
        self._blocks = np.zeros((2, sum(len(c) for c in reference.counts.values())), np.float64)
        self._examples = np.zeros(2, np.int64)

    def observe(self, batch: Batch, weight: np.ndarray | None = None) -> None:
        """Counts the rows of a batch with as many users as targets. weight: float32 [N], how many each stands for."""
        if self._examples[1] >= self.window:
            self._blocks[0], self._examples[0] = self._blocks[1], self._examples[1]
            self._blocks[1], self._examples[1] = 0.0, 0
        rows = np.ones(batch.targets) if weight is None else weight.astype(np.float64)
        counted = _counts(batch, self._schema, self.reference.edges, rows)
        self._blocks[1] += np.concatenate([counted[name] for name in self._names])
        self._examples[1] += batch.targets

    @property
    def examples(self) -> int:
        """How many the index is of."""
        return int(self._examples.sum())

    @property
    def counts(self) -> dict[str, np.ndarray]:
        """feature -> float64 [buckets], as `Reference.counts`, of both blocks together."""
        ends = np.cumsum([len(self.reference.counts[name]) for name in self._names])
        return dict(zip(self._names, np.split(self._blocks.sum(axis=0), ends[:-1]), strict=True))

    def psi(self) -> dict[str, float]:
        """feature -> population stability index, largest first; empty before there are `LEAST` examples.

        PSI = sum over buckets of (a - e) ln(a / e), where e and a are the buckets' shares in training and in the
        stream, each count half a row larger (so that an empty bucket is no infinity). It is the symmetrised
        Kullback-Leibler divergence. Customary: below 0.1 stable, 0.1 to 0.25 shifted, above 0.25 drifted. Chance alone
        makes about (buckets - 1) (1 / n + 1 / m) of it, for n rows there and m here.
        """
        if self.examples < LEAST:
            return {}
        found = {name: index(self.reference.counts[name], its) for name, its in self.counts.items()}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def state(self) -> dict[str, np.ndarray]:
        return {"blocks": self._blocks.copy(), "examples": self._examples.copy()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """CheckpointError where the state is of another bundle's buckets."""
        blocks, examples = state.get("blocks"), state.get("examples")
        if blocks is None or examples is None or blocks.shape != self._blocks.shape or examples.shape != (2,):
            raise CheckpointError("drift: the counts in the checkpoint are of other features; begin anew")
        self._blocks, self._examples = blocks.copy(), examples.copy()


def index(expected: np.ndarray, actual: np.ndarray) -> float:
    """The population stability index of two vectors of counts [buckets], as `Drift.psi` says."""
    e, a = (np.asarray(c, np.float64) + 0.5 for c in (expected, actual))
    e, a = e / e.sum(), a / a.sum()
    return float((a - e) @ np.log(a / e))


def judged(value: float) -> str:
    """stable, shifted or drifted, by the customary limits."""
    return "stable" if value < SHIFTED else "shifted" if value < DRIFTED else "drifted"


# ---------------------------------------------------------------------------------------------- counting
def _sampled(prepared: Prepared) -> Iterator[Batch]:
    """The rows of the reference, in batches."""
    rows = prepared.arrays["split.train"]
    places = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(np.int64) if len(rows) else np.empty(0, int)
    for start in range(0, len(places), _CHUNK):
        yield prepared.batch(rows[places[start : start + _CHUNK]])


def _numbers(batch: Batch, schema: Schema) -> dict[str, np.ndarray]:
    """Dense feature -> scaled values float32 [rows]."""
    sides: dict[bool, Any] = {True: iter(batch.dense_user.numpy().T), False: iter(batch.dense_item.numpy().T)}
    return {f.name: next(sides[f.from_request]) for f in schema.dense}


def _deciles(values: np.ndarray) -> np.ndarray:
    """Distinct inner deciles of the values that are there, float32; a missing value reads as exactly 0, the mean."""
    there = values[values != 0.0]
    return np.unique(np.quantile(there, np.arange(1, 10) / 10).astype(np.float32)) if len(there) else there[:0]


def _counts(batch: Batch, schema: Schema, edges: Mapping[str, np.ndarray], weight: np.ndarray) -> dict[str, np.ndarray]:
    """feature -> float64 [buckets]: the weight of the rows (jagged: of the values) in each."""
    found = {}
    keys = batch.ids.keys()
    values = batch.ids.values().split(batch.ids.length_per_key())
    lengths = batch.ids.lengths().split(batch.ids.stride_per_key())
    for name, its, count in zip(keys, values, lengths, strict=True):
        prints, held = its.numpy(), count.numpy()
        bucket = np.where(prints == MISSING, BUCKETS, prints & (BUCKETS - 1))
        if len(prints) == len(held) and (held == 1).all():
            found[name] = np.bincount(bucket, weight, BUCKETS + 1)
        else:
            found[name] = np.bincount(bucket, np.repeat(weight, held), BUCKETS + 1)
            found[name][BUCKETS] += weight[held == 0].sum()
    for name, numbers in _numbers(batch, schema).items():
        last = len(edges[name]) + 1
        bucket = np.where(numbers == 0.0, last, np.searchsorted(edges[name], numbers, side="right"))
        found[name] = np.bincount(bucket, weight, last + 1)
    return found
