"""Mini-batch aware L2: an id's vector shrinks only in steps where the id occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.errors import SchemaError
from engine.schema import FeatureSpec
from engine.training.distributed import World, gather_all

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics


class MiniBatchAwareL2:
    """Zhou et al. 2018, eq. 6: w_j <- w_j - eta (dL/dw_j + lambda / n_j w_j) for each distinct id j of the batch.

    n_j is the number of times that id j occurs in the training split. The term enters the loss through the vectors that
    the batch looked up, as the sum over occurrences of lambda / (2 c_j n_j) |e|^2 with c_j the occurrences in the batch
    over all features of the space and all processes: its gradient is lambda / n_j w_j, and optimizers that are fused
    into the backward pass see it. Ids without a count (they occur in histories only) have n_j = 1.
    """

    def __init__(
        self, features: Sequence[FeatureSpec], statistics: Mapping[str, IdStatistics], strength: float, world: World
    ) -> None:
        self.strength = strength
        self.world = world
        self.spaces: dict[str, list[str]] = {}
        for feature in features:
            self.spaces.setdefault(feature.space, []).append(feature.name)
        missing = sorted(set(self.spaces) - set(statistics))
        if missing:
            raise SchemaError(f"training.mini_batch_aware_l2 needs the counts of {', '.join(missing)}; there are none")
        self.statistics = {space: statistics[space] for space in self.spaces}
        self.counts = {s: torch.as_tensor(statistics[s].counts, device=world.device) for s in self.spaces}

    def penalty(self, ids: KeyedJaggedTensor, embedded: Mapping[str, JaggedTensor]) -> Tensor:
        """A scalar to add to the mean loss; over processes its *sum* is the batch's penalty."""
        prints = dict(zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True))
        terms = []
        for space, names in self.spaces.items():
            values = torch.cat([prints[n] for n in names])
            vectors = torch.cat([embedded[n].values() for n in names])
            weight = self.strength / (2.0 * self._occurrences(values) * self._counted(space, values))
            terms.append((weight * vectors.square().sum(1)).sum())
        return torch.stack(terms).sum()

    def _occurrences(self, values: Tensor) -> Tensor:
        """c_j of each value, over all processes, float32."""
        everywhere = gather_all(values, self.world)
        distinct, counts = everywhere.unique(return_counts=True)
        return counts[torch.searchsorted(distinct, values)].to(torch.float32)

    def _counted(self, space: str, values: Tensor) -> Tensor:
        """n_j of each value, at least 1, float32."""
        rows = self.statistics[space].rows(values)
        found = self.counts[space][rows.clamp(min=0)] if len(self.counts[space]) else torch.ones_like(rows)
        return torch.where(rows < 0, 1, found).clamp(min=1).to(torch.float32)
