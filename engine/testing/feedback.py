"""The contract of delayed feedback."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.components import DelayedFeedback
from engine.testing.contract import Contract, Options

TRUTHS = (0.001, 0.02, 0.3, 0.9)


def check_delayed_feedback(cls: type[DelayedFeedback], options: Options = None) -> None:
    """Weights without gradient, logits in order, far logits, empty batches; and that training rests at the truth.

    The last is what it is for: on the examples that a stream of true probability p brings, the expected gradient of the
    log loss has to be zero where the model says p, and to lead there from both sides.
    """
    contract = Contract("delayed_feedback", cls, options)
    with contract.when("when it was made"):
        feedback = cls(contract.options)
    after = feedback.presumed_after
    contract.holds(
        after is None or (0 <= after < math.inf), f"must presume after a number of seconds >= 0 or None, not {after}"
    )
    said = torch.tensor([-1e4, -30.0, -3.0, 0.0, 2.0, 30.0, 1e4])
    for label in (0.0, 1.0):
        _weight(contract, feedback, said, torch.full_like(said, label))
    _weight(contract, feedback, torch.empty(0), torch.empty(0))
    with contract.when("giving the loss's logits"):
        at = feedback.logits(said)
    contract.floats(at, (len(said),), "the loss's logits")
    contract.holds(bool((at.diff() >= 0).all()), "must keep the order of the logits")
    for truth in TRUTHS:
        here = math.log(truth / (1 - truth))
        slopes = [_slope(feedback, here + step, truth) for step in (-0.5, 0.0, 0.5)]
        rests = abs(slopes[1]) < 1e-5 and slopes[0] < 0 < slopes[2]
        contract.holds(
            rests,
            f"must rest at the truth: where {truth:g} is true, the loss falls towards another probability "
            f"(slopes {slopes[0]:.3g}, {slopes[1]:.3g}, {slopes[2]:.3g} half a logit below, at and above it)",
        )


def _weight(contract: Contract, feedback: DelayedFeedback, logits: Tensor, labels: Tensor) -> None:
    with contract.when("weighing rows"):
        weight = feedback.weight(logits.clone().requires_grad_(), labels)
    if weight is None:
        return
    contract.floats(weight, (len(logits),), "weights")
    contract.holds(bool((weight >= 0).all()), "must give weights >= 0")
    contract.holds(not weight.requires_grad, "must give weights without a gradient")


def _slope(feedback: DelayedFeedback, said: float, truth: float) -> float:
    """Of the expected loss of an impression: a negative, presumed or what did not become positive, and a positive."""
    logits = torch.full((2,), said, requires_grad=True)
    labels = torch.tensor([0.0, 1.0])
    often = torch.tensor([1 - truth if feedback.presumed_after is None else 1.0, truth])
    weight = feedback.weight(logits, labels)
    weight = often if weight is None else weight * often
    loss = F.binary_cross_entropy_with_logits(feedback.logits(logits), labels, weight, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(gradient.sum())
