"""Negatives of a batch: its own positives, and items drawn from the whole catalogue."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from engine.components import PluginOptions, Sampler
from engine.errors import PluginError
from engine.hookspecs import hookimpl


class MixedSampler(Sampler):
    """The batch's other positives, uniform draws from the catalogue, and draws by popularity.

    In-batch negatives alone never show an item that nobody clicked; the uniform ones do (mixed negative sampling, Yang
    et al. 2020). log_q is of the mixture as one user meets it: B - 1 draws by the share of positives, `uniform` draws
    with 1 / items, `popular` draws with counts ** power; normalised over the M - 1 columns that are not the positive's.
    """

    name = "mixed"

    class Options(PluginOptions):
        uniform: int = Field(256, ge=0, le=1_000_000, description="items drawn uniformly from the catalogue a batch")
        popular: int = Field(0, ge=0, le=1_000_000, description="items drawn by popularity a batch")
        power: float = Field(0.75, ge=0, le=1, description="popularity is counts to this power (word2vec: 0.75)")

    def __init__(self, options: Options, counts: np.ndarray, seed: int) -> None:
        super().__init__(options, counts, seed)
        if not len(counts):
            raise PluginError("sampler 'mixed' has no items to draw from: the catalogue is empty")
        self.options: MixedSampler.Options = options
        self._random = np.random.default_rng(seed)
        frequency = np.maximum(counts.astype(np.float64), 0)
        self._share = frequency / max(1.0, frequency.sum())
        weights = frequency**options.power
        self._weights = weights / weights.sum() if weights.sum() else np.full(len(counts), 1 / len(counts))
        self._running = np.cumsum(self._weights)

    def reseed(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def sample(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        items, options = len(self._share), self.options
        uniform = self._random.integers(items, size=options.uniform)
        drawn = np.searchsorted(self._running, self._random.random(options.popular), side="right")
        rows = np.concatenate([positives.cpu().numpy(), uniform, np.minimum(drawn, items - 1)])
        draws = max(0, len(positives) - 1) * self._share[rows] + options.uniform / items
        draws = draws + options.popular * self._weights[rows]
        # an item that training never counted, met only as a positive, is drawn as if it had been counted once
        least = 1.0 / max(1, len(rows) - 1)
        log_q = np.log(np.maximum(draws, least * 1e-6) / max(1, len(rows) - 1))
        device = positives.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(log_q.astype(np.float32)).to(device)


@hookimpl
def samplers() -> list[type[Sampler]]:
    return [MixedSampler]
