"""Logloss on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.components import Loss
from engine.hookspecs import hookimpl


class BinaryCrossEntropy(Loss):
    """Logloss: binary cross-entropy on logits, the weighted mean over rows where weights are given.

    Shapes: logits [N], labels [N] in [0, 1], weight [N] >= 0 or None -> scalar, in nats. Weights that sum to zero
    give zero, and so does a batch without rows.
    """

    name = "bce"

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **context: Tensor) -> Tensor:
        if weight is None:
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            return losses / max(len(labels), 1)
        losses = F.binary_cross_entropy_with_logits(logits, labels, weight, reduction="sum")
        return losses / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


@hookimpl
def losses() -> list[type[Loss]]:
    return [BinaryCrossEntropy]
