"""Negatives at once, and the logits of a stream in which every positive was a negative before."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.components import DelayedFeedback
from engine.hookspecs import hookimpl
from plugins.feedback.presuming import Presuming


class FakeNegativeCalibrated(Presuming):
    """Every impression is a negative at once, and a positive again if it becomes one; the loss is taken at those odds.

    Of the stream's examples p / (1 + p) = b are positive, so p = b / (1 - b): the fake negative calibration of Ktena et
    al. 2019, "Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR Prediction". There a
    model of b is trained and b / (1 - b) is served. Here the loss is taken at the logit of b, which is ln p, where the
    model says p: what the model says is served as it is, b stays below 1/2, and one goes on from any bundle.
    """

    name = "fnc"

    def logits(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits)

    def weight(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return None


@hookimpl
def delayed_feedback() -> list[type[DelayedFeedback]]:
    return [FakeNegativeCalibrated]
