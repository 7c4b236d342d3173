"""How candidates are found by vectors: two towers, negatives, an index.

Shapes: U users, M items, D width, V vectors an item, B rows, Q queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from engine.components.base import Component, PluginOptions
from engine.components.networks import Inputs, InputSpec


class Encoder(nn.Module, Component, ABC):
    """Two sides into one space, where the inner product ranks."""

    output_dim: int

    def __init__(self, user: InputSpec, item: InputSpec, options: PluginOptions) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def users(self, inputs: Inputs) -> Tensor:
        """User and context fields, the pooled history among them -> [U, D]."""

    @abstractmethod
    def items(self, inputs: Inputs) -> Tensor:
        """Item fields -> [M, D] or [M, V, D] for several vectors an item."""


class Sampler(Component, ABC):
    """Chooses negatives for an encoder's batch."""

    def __init__(self, options: PluginOptions, counts: np.ndarray, seed: int) -> None:
        """counts: int64 [items], how often each catalogue item is a positive in the training split."""
        self.options = options

    @abstractmethod
    def sample(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        """positives: int64 [B] catalogue rows -> (items [M] int64 whose first B are the positives, log_q [M])."""

    @abstractmethod
    def reseed(self, seed: int) -> None:
        """What is drawn from here on follows from this seed alone, as if the sampler had been made with it.

        Called before each step of learning from the stream, so that what goes on from a checkpoint draws the same.
        """


class Retriever(Component, ABC):
    """Nearest items by inner product. Ids are int64; searching while upserting is safe."""

    def __init__(self, dim: int, options: PluginOptions) -> None:
        self.dim = dim
        self.options = options

    @abstractmethod
    def build(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids int64 [n], vectors float32 [n, D]; replaces what was there."""

    @abstractmethod
    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None: ...

    @abstractmethod
    def delete(self, ids: np.ndarray) -> None: ...

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """queries float32 [Q, D] -> ids int64 [Q, k] (-1 where fewer), scores float32 [Q, k] descending (-inf there).

        allowed: int64 ids that may be returned, or None for all.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes into an existing, empty folder; safetensors, no pickle."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Memory-maps what `save` wrote."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """size, dim, bytes and whatever describes the index."""
