"""The contract of losses, for rankers and for encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.components import Loss
from engine.testing.contract import Contract, Options


def check_loss(cls: type[Loss], options: Options = None) -> None:
    """A finite scalar that its gradient lowers, weights, empty batches, and for encoders masks and log_q.

    It is tried with what `cls.trains` names: rankers, encoders or both.
    """
    contract = Contract("losses", cls, options)
    with contract.when("when it was made"):
        loss = cls(contract.options)
    contract.holds(
        cls.trains and cls.trains <= {"ranker", "encoder"},
        f"must train ranker, encoder or both, `trains` is {set(cls.trains)}",
    )
    for trained, check in (("ranker", _ranker), ("encoder", _encoder)):
        if trained in cls.trains:
            check(contract, loss)


def _ranker(contract: Contract, loss: Loss) -> None:
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(16, generator=random).requires_grad_()
    labels = (torch.rand(16, generator=random) < 0.4).float()
    _descends(contract, loss, logits, labels)
    value = loss(logits, labels)
    contract.equal(value, loss(logits, labels, torch.ones(16)), "must take equal weights as no weights")
    weight = torch.ones(16)
    weight[::2] = 0.0
    (gradient,) = torch.autograd.grad(loss(logits, labels, weight), logits)
    contract.holds(not gradient[::2].any(), "must not learn from rows of weight zero")
    far = torch.tensor([1e4, -1e4])
    contract.holds(torch.isfinite(loss(far, torch.tensor([0.0, 1.0]))), "must stay finite for logits of +-10000")
    _empty(contract, loss, torch.empty(0), torch.empty(0))


def _encoder(contract: Contract, loss: Loss) -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 10, generator=random).requires_grad_()
    labels = torch.arange(6)
    _descends(contract, loss, logits, labels)
    contract.equal(loss(logits, labels), loss(logits, labels, torch.ones(6)), "must take equal weights as no weights")
    mask = torch.zeros(6, 10, dtype=torch.bool)
    mask[:, 8] = True
    log_q = torch.full((10,), -3.0)
    with contract.when("with `log_q` and `mask`"):
        value = loss(logits, labels, log_q=log_q, mask=mask)
    contract.holds(torch.isfinite(value), "must be finite with `log_q` and `mask`")
    (gradient,) = torch.autograd.grad(value, logits)
    contract.holds(not gradient[:, 8].any(), "must not learn from an item that `mask` says is no negative")
    _empty(contract, loss, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


def _descends(contract: Contract, loss: Loss, logits: Tensor, labels: Tensor) -> None:
    with contract.when("on a batch"):
        value = loss(logits, labels)
    contract.floats(value, (), "the loss")
    (gradient,) = torch.autograd.grad(value, logits)
    contract.holds(torch.isfinite(gradient).all() and gradient.any(), "must give a finite gradient that is not zero")
    lower = loss((logits - 0.1 * gradient / gradient.norm()).detach(), labels)
    contract.holds(lower < value, "must fall along its own negative gradient")


def _empty(contract: Contract, loss: Loss, logits: Tensor, labels: Tensor) -> None:
    with contract.when("on a batch without rows"):
        value = loss(logits.requires_grad_(), labels)
    contract.holds(torch.isfinite(value), "must be finite for a batch without rows (a process may get none)")
