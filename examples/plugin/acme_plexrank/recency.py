"""The interest `recency`: yesterday counts more than last month."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel, PluginOptions
from engine.hookspecs import hookimpl


class RecencyInterest(InterestModel):
    """A weighted mean of the history, whose weights halve every few items.

    The item at position j (0 is the newest) weighs 2^(-j / half_life); the weights of a user sum to one. The default,
    ten items, gives the newest of fifty about 7 % of the weight and the oldest 0.2 %.
    """

    name = "recency"

    class Options(PluginOptions):
        half_life: float = Field(10.0, gt=0, description="positions after which an item weighs half")

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        """targets [N, D], history [T, D] over U users, newest first -> [N, D]; no history gives zeros."""
        user, weights = self._weights(history)
        sums = history.values().new_zeros(len(history.lengths()), history.values().shape[1])
        return sums.index_add(0, user, weights.unsqueeze(1) * history.values()).index_select(0, user_of_target)

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        """The same weights for every target of a user: values [P, 1] over N targets."""
        _, weights = self._weights(history)
        lengths = history.lengths().long()[user_of_target]
        starts = history.offsets().long()[:-1][user_of_target]
        target = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        within = torch.arange(len(target), device=lengths.device) - (lengths.cumsum(0) - lengths)[target]
        return JaggedTensor(values=weights[starts[target] + within].unsqueeze(1), lengths=lengths)

    def _weights(self, history: JaggedTensor) -> tuple[Tensor, Tensor]:
        """The user of each history item int64 [T], and its weight float32 [T]."""
        lengths = history.lengths().long()
        user = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        position = torch.arange(len(user), device=lengths.device) - history.offsets().long()[user]
        weights = torch.exp2(-position / self.options.half_life)
        total = weights.new_zeros(len(lengths)).index_add(0, user, weights)
        return user, weights / total[user]


@hookimpl
def interests() -> list[type[InterestModel]]:
    """What this module brings."""
    return [RecencyInterest]
