"""Negatives at once, and importance weights for those that turn out to be positive."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.components import DelayedFeedback
from engine.hookspecs import hookimpl
from plugins.feedback.presuming import Presuming


class FakeNegativeWeighted(Presuming):
    """Every impression is a negative at once, and a positive again if it becomes one; weights undo the negative.

    With p as the model says it now, a positive counts for 1 + p and a negative for (1 - p) (1 + p): the ratios of the
    true distribution to that of the stream, whose share of positives is p / (1 + p): the fake negative weighted loss of
    Ktena et al. 2019, "Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR Prediction". The
    expected gradient is that of the log loss times 1 - p^2, which is zero at the truth alone.
    """

    name = "fnw"

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    def weight(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = torch.sigmoid(logits.detach())
        return (1 + p) * torch.where(labels > 0.5, 1.0, 1 - p)


@hookimpl
def delayed_feedback() -> list[type[DelayedFeedback]]:
    return [FakeNegativeWeighted]
