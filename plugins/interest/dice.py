"""Dice, the data-adaptive activation of DIN."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Dice(nn.Module):
    """f(s) = p * s + (1 - p) * alpha * s with p = sigmoid((s - E[s]) / sqrt(Var[s] + eps)), a channel each.

    Shapes: s [P, C] -> [P, C]. Statistics are those of the batch in training, over all processes (so that one process
    and two agree), and running ones in evaluation. alpha starts at 0. Every process must call it equally often in
    training, also with no rows.

    Source: Zhou et al. 2018, section 5.3; eps 1e-8 as there. The running ones move by `momentum` a batch, biased.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, s: Tensor) -> Tensor:
        if not self.training:
            return self._with_running_statistics(s)
        y, mean, var, rows = _Dice.apply(s, self.alpha, self.eps, _world() > 1)
        if int(rows):
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return y

    def _with_running_statistics(self, s: Tensor) -> Tensor:
        scale = torch.rsqrt(self.running_var + self.eps)
        if torch.is_grad_enabled() and (s.requires_grad or self.alpha.requires_grad):
            p = torch.sigmoid((s - self.running_mean) * scale)
            return s * (self.alpha + (1 - self.alpha) * p)
        p = torch.addcmul(-self.running_mean * scale, s, scale).sigmoid_()
        return torch.addcmul(self.alpha, p, 1 - self.alpha, out=p).mul_(s)


class _Dice(torch.autograd.Function):
    """Dice with the statistics of its own input; the gradient goes through them, as in batch normalisation.

    With z = (s - m) r, r = 1 / sqrt(v + eps), p = sigmoid(z), g the gradient of f:
    d alpha = sum g s (1 - p);  dz = g s (1 - alpha) p (1 - p);
    ds = g (alpha + (1 - alpha) p) + r (dz - mean dz - z mean(dz z)).
    Two large tensors are kept (s, p) where the composed form keeps eight.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: Tensor, eps: float, everywhere: bool) -> tuple[Tensor, ...]:
        rows = s.new_tensor([s.shape[0]])
        total = s.sum(0)
        if everywhere:
            rows, total = _sum_over_processes(rows, total)
        count = rows.clamp(min=1)
        mean = total / count
        p = s - mean
        square = (p * p).sum(0)
        if everywhere:
            (square,) = _sum_over_processes(square)
        var = square / count
        scale = torch.rsqrt(var + eps)
        p.mul_(scale).sigmoid_()
        ctx.save_for_backward(s, p, alpha, mean, scale, count)
        ctx.everywhere = everywhere
        ctx.mark_non_differentiable(mean, var, rows)
        return torch.addcmul(alpha, p, 1 - alpha).mul_(s), mean, var, rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s, p, alpha, mean, scale, count = ctx.saved_tensors
        g = gradients[0]
        gs = g * s
        gsp = gs * p
        by_alpha = gs.sum(0) - gsp.sum(0)
        dz = gsp.addcmul_(gsp, p, value=-1).mul_(1 - alpha)  # g s (1 - alpha) p (1 - p)
        sums = dz.sum(0), (dz * s).sum(0)
        if ctx.everywhere:
            sums = _sum_over_processes(*sums)
        by_mean = sums[0] / count
        by_scale = (sums[1] - mean * sums[0]) * scale * scale / count  # r mean(dz z), to multiply (s - m)
        by_s = torch.addcmul(alpha, p, 1 - alpha, out=gs).mul_(g)
        # r (dz - by_mean) - r by_scale (s - m)
        by_s.addcmul_(dz, scale).addcmul_(s, -scale * by_scale).add_(scale * (by_scale * mean - by_mean))
        return by_s, by_alpha, None, None


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums over all processes, sent together; float64, so that the order of the processes does not show."""
    flat = torch.cat([v.double().reshape(-1) for v in values])
    dist.all_reduce(flat)
    parts = flat.split([v.numel() for v in values])
    return tuple(part.reshape(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True))
