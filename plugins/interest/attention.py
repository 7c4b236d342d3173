"""Dot-product attention over the history."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from engine.components import InterestModel, PluginOptions
from engine.hookspecs import hookimpl
from plugins.interest import ragged
from plugins.interest.weighed import WeighedHistory


class AttentionInterest(WeighedHistory):
    """Dot-product attention: softmax over the history of target . item / sqrt(D), no parameters of its own.

    Shapes: targets [N, D], history [T, D] over U users -> [N, D]; a user without history gives zeros.
    Source: scaled dot-product attention, Vaswani et al. 2017, eq. 1, with the target as the query.
    """

    name = "attention"

    class Options(PluginOptions):
        max_history: int = Field(100, gt=0, description="newest items kept")

    def _of_one_user(self, targets: Tensor, items: Tensor) -> Tensor:
        return torch.softmax(targets @ items.T * self.dim**-0.5, dim=1) @ items

    def _weights(self, targets: Tensor, history: Tensor, pairs: ragged.Pairs) -> Tensor:
        logits = (ragged.repeat(targets, pairs) * pairs.items(history)).sum(1) * self.dim**-0.5
        return ragged.segment_softmax(logits, pairs)


@hookimpl
def interests() -> list[type[InterestModel]]:
    return [AttentionInterest]
