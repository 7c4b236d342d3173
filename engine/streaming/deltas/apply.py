"""A delta in a frozen model: whether it follows and fits, its rows into the tables, its dense part into a second model.

Rows are written in place, a few at a time: a reader may meet a row that is half of one version and half of the next,
which lie a step of the optimizer apart. The dense part is never changed in place.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn

from engine.bundle.tensors import finite
from engine.errors import BundleError, DeltaGap
from engine.inference.quantised import dims, quantised
from engine.model import RankingModel
from engine.streaming.deltas.delta import Delta, TableRows, version_of

CHUNK = 500
"""Most rows that are written before other threads get their turn."""
_PAUSE = 0.001
_LARGE_CHUNK = 8192

TABLES = "embedding.weights."
"""What a table's name follows in the model's state_dict."""


class Step(Enum):
    """What a delta is to a chain: the next one, one that was applied, or the first of a chain begun anew."""

    NEXT = "next"
    KNOWN = "known"
    ANEW = "anew"


@dataclass(frozen=True)
class Chain:
    """Where a scorer stands: on a bundle (sequence 0), or some deltas behind it."""

    model: str
    base: str
    epoch: int = 0
    sequence: int = 0

    @property
    def version(self) -> str:
        return version_of(self.base, self.epoch, self.sequence)

    def step(self, delta: Delta) -> Step:
        """BundleError for another model's delta; DeltaGap for one that does not follow."""
        if delta.model != self.model:
            raise BundleError(f"delta {delta.version} is of model '{delta.model}'; '{self.model}' scores here")
        if delta.sequence < 1 or delta.epoch < 0:
            raise BundleError(
                f"delta {delta.version}: epoch {delta.epoch}, sequence {delta.sequence}: sequences begin at 1"
            )
        if delta.base != self.base:
            raise DeltaGap(
                f"delta {delta.version} grew from bundle {delta.base}; {self.base} is loaded: load its bundle"
            )
        if delta.epoch < self.epoch:
            raise DeltaGap(f"delta {delta.version} is of a chain that was left: {self.version} scores")
        if delta.epoch == self.epoch and delta.sequence <= self.sequence:
            return Step.KNOWN
        if delta.after <= self.sequence and (delta.epoch == self.epoch or self.sequence == 0):
            return Step.NEXT  # of a merged one a part may be in already: rows carry what they are now
        if delta.epoch > self.epoch and delta.after == 0:
            return Step.ANEW
        raise DeltaGap(
            f"delta {delta.version} follows {delta.parent}; {self.version} scores: load the bundle and go on"
        )

    def after(self, delta: Delta) -> Chain:
        return Chain(self.model, self.base, delta.epoch, delta.sequence)


def tables(model: nn.Module) -> Mapping[str, Tensor]:
    """table -> its weights float32 [rows, dim], or quantised; nothing for an embedding method without tables."""
    weights = getattr(model.embedding, "weights", None)
    return dict(weights.items()) if isinstance(weights, nn.ParameterDict) else {}


def check_fit(model: nn.Module, delta: Delta) -> None:
    """BundleError for the first table, row, value or dense tensor that is not of this model or not finite."""
    weights, narrower = tables(model), dims(model.embedding)
    for name, part in delta.tables.items():
        weight = weights.get(name)
        dim = 0 if weight is None else narrower.get(name, weight.shape[1])
        _check_rows(f"delta {delta.version}: table '{name}'", weight, dim, part)
    if not delta.dense:
        return
    state = model.state_dict()
    for name, tensor in delta.dense.items():
        where, there = f"delta {delta.version}: tensor '{name}'", state.get(name)
        if there is None or name.removeprefix(TABLES) in weights:
            raise BundleError(f"{where} is not of the dense part of this model: load the bundle it grew from")
        if tensor.shape != there.shape or tensor.dtype != there.dtype:
            raise BundleError(
                f"{where} is {tensor.dtype} {tuple(tensor.shape)}, the model's {there.dtype} {tuple(there.shape)}"
            )
        if not finite(tensor):
            raise BundleError(f"{where} holds numbers that are not finite")


def _check_rows(where: str, weight: Tensor | None, dim: int, part: TableRows) -> None:
    if weight is None:
        raise BundleError(f"{where}: the model has no such table: load the bundle it grew from")
    rows, values = part.rows, part.values
    if rows.ndim != 1 or rows.dtype != np.int64 or values.shape != (len(rows), dim):
        raise BundleError(
            f"{where}: rows {rows.dtype}{list(rows.shape)} with values {list(values.shape)}; "
            f"wanted int64 [n] with [n, {dim}]"
        )
    if values.dtype != np.float32:
        raise BundleError(f"{where}: values are {values.dtype}; wanted float32")
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(weight) or (rows[1:] <= rows[:-1]).any()):
        raise BundleError(f"{where}: rows must be ascending, distinct and below {len(weight)}")
    if not np.isfinite(values).all():
        raise BundleError(f"{where}: row {rows[~np.isfinite(values).all(axis=1)][0]} is not finite")


def write_rows(model: nn.Module, parts: Mapping[str, TableRows], *, pause: bool = True) -> None:
    """Checked rows into the tables, in place. The tables must be this process's to write: those of a bundle are copied
    when they are read, or mapped so that a page that is written to is copied. pause: as in `chunks`."""
    weights = tables(model)
    for name, part in parts.items():
        for chunk in chunks(len(part.rows), pause=pause):
            with torch.inference_mode():
                rows, values = torch.from_numpy(part.rows[chunk]), torch.from_numpy(part.values[chunk])
                weight = weights[name]
                weight.index_copy_(0, rows, quantised(values) if weight.dtype == torch.uint8 else values)


def chunks(rows: int, *, pause: bool = True) -> Iterator[slice]:
    """Slices of at most `CHUNK` rows; between two of them other threads get the interpreter, for long enough that a
    request which was waiting for it gets on.

    pause: False in a process of its own, which keeps no request from the interpreter: larger slices, one at once after
        the other.
    """
    size = CHUNK if pause else _LARGE_CHUNK
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
        if pause:
            time.sleep(_PAUSE)


def with_own_dense(model: RankingModel) -> RankingModel:
    """The same model with its dense part in memory of its own, tensor by tensor: a copy of one is a copy of no more."""
    weights = tables(model)
    state = {n: t if n.removeprefix(TABLES) in weights else t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def with_dense(model: RankingModel, dense: Mapping[str, Tensor]) -> RankingModel:
    """A second model, settled, with these tensors in place of its own; the tables are shared with the first.

    model: one that `with_own_dense` gave.
    """
    embedding = model.embedding
    if any(name.startswith("embedding.") for name in dense):
        embedding = copy.deepcopy(embedding, {id(weight): weight for weight in tables(model).values()})
    second = RankingModel(model.schema, embedding, copy.deepcopy(model.interest), copy.deepcopy(model.ranker))
    with torch.no_grad():
        second.load_state_dict(dict(dense), strict=False)  # names were checked; the rest is the first's
    second.eval().requires_grad_(False)
    second.settle()
    return second
