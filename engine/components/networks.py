"""What a ranking model is put together from: embedding, interest, network, loss.

Shapes: B rows, U users, N targets, D width, T total length of jagged values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.components.base import Component, PluginOptions
from engine.schema import FeatureSpec

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics


@dataclass(frozen=True)
class Memory:
    """Bytes, measured: training counts parameters and optimizer state, inference the frozen form."""

    training: int
    inference: int


class EmbeddingMethod(nn.Module, Component, ABC):
    """Ids to vectors, one vector a value, *unpooled*, so that a target and a history look into the same table.

    features: the embedded features (never dense ones), `FeatureSpec.dim` already resolved.
    statistics: space -> distinct fingerprints and their counts in the training split; empty unless
        `needs_statistics` (then the engine passes over the data first, and keeps them in the bundle).
    """

    needs_statistics: ClassVar[bool] = False

    @classmethod
    def wants_statistics(cls, options: PluginOptions) -> bool:
        """Whether statistics are needed with these options; the engine asks this."""
        return cls.needs_statistics

    def __init__(
        self, features: Sequence[FeatureSpec], options: PluginOptions, statistics: Mapping[str, IdStatistics]
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.options = options

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """feature -> width of its vectors; features of one space have one width."""

    @abstractmethod
    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Fingerprints (int64; a stride per key may differ) -> float32 [T_f, widths[f]] a feature, lengths kept."""

    @abstractmethod
    def memory_bytes(self) -> Memory: ...

    @abstractmethod
    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """table -> distinct rows (int64) that these ids read; what a delta has to carry."""

    @abstractmethod
    def freeze(self) -> nn.Module:
        """The smallest inference form: the same forward, plain tensors, no optimizer, no process group."""


class InterestModel(nn.Module, Component, ABC):
    """What a user wants now, given the history and a target.

    dim: D, the width of a target's and of a history item's vector. `output_dim`: K.
    """

    output_dim: int

    def __init__(self, dim: int, options: PluginOptions) -> None:
        super().__init__()
        self.dim = dim
        self.options = options
        self.output_dim = dim

    @abstractmethod
    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        """targets [N, D], history [T, D] over U users (newest first), user_of_target [N] int64 -> [N, K].

        A user without history gives zeros. Never pads to the longest history.
        """

    @abstractmethod
    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        """The weight of each history item for each target: values [P, 1] over N targets, in the history's order."""


@dataclass(frozen=True)
class InputSpec:
    """Widths of what a network reads: fields (name -> width, in order) and the number of dense columns."""

    fields: dict[str, int]
    dense: int = 0
    from_request: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        return sum(self.fields.values()) + self.dense


@dataclass
class Inputs:
    """What a ranker or tower reads: fields name -> [N, width] (pooled, user side repeated), dense [N, M]."""

    fields: dict[str, Tensor]
    dense: Tensor

    def concat(self) -> Tensor:
        """All columns behind one another -> [N, InputSpec.width]."""
        return torch.cat([*runs(list(self.fields.values())), self.dense], dim=1)

    def beside(self, names: Sequence[str]) -> Tensor:
        """These fields behind one another -> [N, sum of their widths], without a copy where they lie so."""
        found = runs([self.fields[name] for name in names])
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def runs(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [N, w] to put side by side; those that are neighbouring columns of one tensor already come as one.

    Vectors of many tables are looked up into one tensor and then told apart: to join 26 of them again would copy all,
    and their gradients one by one.
    """
    if torch.compiler.is_exporting():
        return list(parts)  # where they lie is no part of a graph
    found: list[Tensor] = []
    whole: Tensor | None = None
    first = last = 0
    for part in parts:
        base = _columns_of(part)
        begin = 0 if base is None else int(part.storage_offset()) - int(base.storage_offset())
        if base is not None and base is whole and begin == last:
            last = begin + part.shape[1]
            found[-1] = base if last - first == base.shape[1] else base[:, first:last]
        else:
            whole, first, last = base, begin, begin + part.shape[1]
            found.append(part)
    return found


def _columns_of(part: Tensor) -> Tensor | None:
    """The tensor [N, W] of which `part` [N, w] is columns, in all its rows; None if it is no such view of one, or one
    that passes no gradient on."""
    base: Tensor | None = part._base
    if base is None or base.dim() != 2 or part.dim() != 2 or (base.requires_grad and part.grad_fn is None):
        return None
    return base if part.shape[0] == base.shape[0] and part.stride() == base.stride() else None


class Ranker(nn.Module, Component, ABC):
    """Scores targets for one or more tasks."""

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: PluginOptions) -> None:
        super().__init__()
        self.inputs = inputs
        self.tasks = list(tasks)
        self.options = options

    @abstractmethod
    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """-> task -> logits float32 [N]."""


class Loss(nn.Module, Component, ABC):
    """A training objective.

    trains: what it is for, "ranker" or "encoder" or both; a configuration that uses it elsewhere is refused.
    """

    trains: ClassVar[frozenset[str]] = frozenset({"ranker"})

    def __init__(self, options: PluginOptions) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **context: Tensor) -> Tensor:
        """Rankers: logits [N], labels [N]. Encoders: logits [B, M] of users against items, labels [B] the positive's
        column; `context` may hold `log_q` [M] (log sampling probability) and `mask` [B, M] (true: not a negative)."""
