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
        return torch.cat([*self.fields.values(), self.dense], dim=1)


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
