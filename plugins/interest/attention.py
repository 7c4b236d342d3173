"""Dot-product attention over the history."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel, PluginOptions
from engine.hookspecs import hookimpl
from plugins.interest import ragged


class AttentionInterest(InterestModel):
    """Dot-product attention: softmax over the history of target . item / sqrt(D), no parameters of its own.

    Shapes: targets [N, D], history [T, D] over U users -> [N, D]; a user without history gives zeros.
    Source: scaled dot-product attention, Vaswani et al. 2017, eq. 1, with the target as the query.
    """

    name = "attention"

    class Options(PluginOptions):
        max_history: int = Field(100, gt=0, description="newest items kept")

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        history = ragged.newest(history, self.options.max_history)
        if len(history.lengths()) == 1 and len(history.values()):
            items = history.values()
            return torch.softmax(targets @ items.T * self.dim**-0.5, dim=1) @ items
        pairs = ragged.pairs(history, user_of_target)
        items = pairs.items(history.values())
        return ragged.attend(items, self._weights(targets, items, pairs), pairs)

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        history = ragged.newest(history, self.options.max_history)
        pairs = ragged.pairs(history, user_of_target)
        weights = self._weights(targets, pairs.items(history.values()), pairs)
        return JaggedTensor(values=weights.unsqueeze(1), lengths=pairs.lengths)

    def _weights(self, targets: Tensor, items: Tensor, pairs: ragged.Pairs) -> Tensor:
        logits = (ragged.repeat(targets, pairs) * items).sum(1) * self.dim**-0.5
        return ragged.segment_softmax(logits, pairs)


@hookimpl
def interests() -> list[type[InterestModel]]:
    return [AttentionInterest]
