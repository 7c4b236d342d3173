"""Softmax over sampled items."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from engine.components import Loss, PluginOptions
from engine.hookspecs import hookimpl


class SampledSoftmax(Loss):
    """Softmax of the positive against sampled negatives, corrected for how often each item is sampled (logQ).

    Shapes: logits [B, M] of users against items, labels int64 [B] the positive's column, log_q [M] the log probability
    of drawing each item as a negative, mask bool [B, M] true where an item is no negative of a user -> scalar, in nats;
    zero for a batch without users.

    A negative's logit is lowered by the log of its expected number of draws, log((M - 1) q); the positive's is left as
    it is. The sum over negatives is then an unbiased estimate of the sum over the whole catalogue without the positive
    (Jean et al. 2015, section 3.1), which it is not when the positive is corrected as well, as in Yi et al. 2019.
    """

    name = "sampled_softmax"
    trains = frozenset({"encoder"})

    class Options(PluginOptions):
        logq: bool = Field(True, description="correct for the sampling probability, where the sampler tells it")

    options: Options

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **context: Tensor) -> Tensor:
        users, columns = logits.shape
        if not users:
            return logits.sum()
        corrected = logits
        if self.options.logq and "log_q" in context:
            corrected = logits - (context["log_q"] + math.log(max(1, columns - 1)))
        if "mask" in context:
            corrected = corrected.masked_fill(context["mask"], -math.inf)
        column = labels.unsqueeze(1)
        corrected = corrected.scatter(1, column, logits.gather(1, column))
        losses = F.cross_entropy(corrected, labels, reduction="none")
        return losses.mean() if weight is None else (losses * weight).sum() / weight.sum().clamp_min(1e-12)


@hookimpl
def losses() -> list[type[Loss]]:
    return [SampledSoftmax]
