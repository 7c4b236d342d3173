"""Dice, the data-adaptive activation of DIN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Dice(nn.Module):
    """f(s) = p * s + (1 - p) * alpha * s with p = sigmoid((s - E[s]) / sqrt(Var[s] + eps)), a channel each.

    Shapes: s [P, C] -> [P, C]. Statistics are those of the batch in training, over all processes (so that one process
    and two agree), and running ones in evaluation. alpha starts at 0. Every process must call it equally often in
    training, also with no rows. In evaluation without gradient it works in place, as ReLU(inplace=True) does.

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
        if torch.compiler.is_exporting():
            # 1 / sqrt by an exponential: compiled code makes those once a channel, but a root again for every number
            scale = torch.exp(-0.5 * torch.log(self.running_var + self.eps))
            p = torch.sigmoid(s * scale + -self.running_mean * scale)
            return s * (self.alpha + (1 - self.alpha) * p)
        if torch.is_grad_enabled():
            scale = torch.rsqrt(self.running_var + self.eps)
            p = torch.sigmoid((s - self.running_mean) * scale)
            return s * (self.alpha + (1 - self.alpha) * p)
        return _dice(s, _tile(*self._folded()), out=s)

    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale, shift, alpha, beta), each [C]: f(s) = s * (alpha + beta * sigmoid(scale * s + shift))."""
        scale = torch.rsqrt(self.running_var + self.eps)
        return scale, -self.running_mean * scale, self.alpha, 1 - self.alpha

    def for_blocks(self) -> Callable[[Tensor], Tensor]:
        """Dice with its running statistics, for blocks that fit the cache: s [P, C] -> the same tensor, overwritten."""
        scale, shift, alpha, beta = self._folded()

        def dice(s: Tensor) -> Tensor:
            p = torch.addcmul(shift, s, scale).sigmoid_()
            return s.mul_(torch.addcmul(alpha, p, beta, out=p))

        return dice


def _dice(s: Tensor, parameters: Sequence[Tensor], out: Tensor) -> Tensor:
    """Dice for tiled (scale, -mean scale, alpha, 1 - alpha), contiguous [P, C] -> `out` [P, C] (may be s itself),
    without gradient."""
    for block, y in zip(_blocks(s), _blocks(out), strict=True):
        wide_scale, shift, wide_alpha, beta = (p[: block.shape[1]] for p in parameters)
        p = torch.addcmul(shift, block, wide_scale).sigmoid_()
        torch.mul(block, torch.addcmul(wide_alpha, p, beta, out=p), out=y)
    return out


class _Dice(torch.autograd.Function):
    """Dice with the statistics of its own input; the gradient goes through them, as in batch normalisation.

    With z = (s - m) r, r = 1 / sqrt(v + eps), p = sigmoid(z), g the gradient of f:
    d alpha = sum g s (1 - p);  dz = g s (1 - alpha) p (1 - p);
    ds = g (alpha + (1 - alpha) p) + r (dz - mean dz - z mean(dz z)).
    It goes through the rows in blocks that stay in the cache, and keeps nothing but s: p is cheaper made again.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: Tensor, eps: float, everywhere: bool) -> tuple[Tensor, ...]:
        s = s.contiguous()
        rows = s.new_tensor([s.shape[0]])
        total = s.sum(0)
        if everywhere:
            rows, total = _sum_over_processes(rows, total)
        count = rows.clamp(min=1)
        mean = total / count
        (wide_mean,), squares = _tile(mean), _sums(mean)
        for block in _blocks(s):
            width = block.shape[1]
            squares[:width] += (block - wide_mean[:width]).square_().sum(0)
        square = _untile(squares, mean)
        if everywhere:
            (square,) = _sum_over_processes(square)
        var = square / count
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(s, alpha, mean, scale, count)
        ctx.everywhere = everywhere
        ctx.mark_non_differentiable(mean, var, rows)
        parameters = _tile(scale, -mean * scale, alpha, 1 - alpha)
        return _dice(s, parameters, torch.empty_like(s)), mean, var, rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s, alpha, mean, scale, count = ctx.saved_tensors
        by_s = torch.empty_like(s)
        sums_alpha, sums_dz, sums_dzz = _sums(alpha), _sums(alpha), _sums(alpha)
        parameters = _tile(scale, -mean * scale, alpha, 1 - alpha)
        for block, g, out in zip(_blocks(s), _blocks(gradients[0].contiguous()), _blocks(by_s), strict=True):
            width = block.shape[1]
            wide_scale, shift, wide_alpha, beta = (p[:width] for p in parameters)
            z = torch.addcmul(shift, block, wide_scale)
            p = torch.sigmoid(z)
            torch.addcmul(wide_alpha, p, beta, out=out).mul_(g)
            gs = g * block
            dz = gs.addcmul_(gs, p, value=-1)  # g s (1 - p)
            sums_alpha[:width] += dz.sum(0)
            dz.mul_(p).mul_(beta)
            sums_dz[:width] += dz.sum(0)
            out.addcmul_(dz, wide_scale)
            sums_dzz[:width] += dz.mul_(z).sum(0)
        sum_dz, sum_dzz = _untile(sums_dz, alpha), _untile(sums_dzz, alpha)
        if ctx.everywhere:
            sum_dz, sum_dzz = _sum_over_processes(sum_dz, sum_dzz)
        by_mean, by_z = _tile(-scale * sum_dz / count, -scale * sum_dzz / count)
        for block, out in zip(_blocks(s), _blocks(by_s), strict=True):
            width = block.shape[1]
            wide_scale, shift = (p[:width] for p in parameters[:2])
            z = torch.addcmul(shift, block, wide_scale)
            out.addcmul_(z, by_z[:width]).add_(by_mean[:width])
        return by_s, _untile(sums_alpha, alpha), None, None


# The loops above are fast where an operation meets long rows in the cache: K rows of C channels count as one row of K C
# numbers, against parameters repeated K times; a last, shorter row holds what is left.
_K = 8
_BLOCK = 2**17


def _blocks(values: Tensor) -> list[Tensor]:
    """[P, C] contiguous -> views [rows, K C] of some 512 KB, then one [1, (P mod K) C] if K does not divide P."""
    channels = values.shape[1]
    flat = values.view(-1)
    whole = len(values) // _K * _K * channels
    blocks = list(flat[:whole].view(-1, _K * channels).split(max(1, _BLOCK // (_K * channels)))) if whole else []
    return [*blocks, flat[whole:].view(1, -1)] if whole < len(flat) else blocks


def _tile(*parameters: Tensor) -> list[Tensor]:
    """Each [C] -> [K C]."""
    return [p.repeat(_K) for p in parameters]


def _sums(like: Tensor) -> Tensor:
    return like.new_zeros(_K * len(like))


def _untile(sums: Tensor, like: Tensor) -> Tensor:
    """Sums [K C] -> [C]."""
    return sums.view(_K, len(like)).sum(0)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums over all processes, sent together; float64, so that the order of the processes does not show."""
    flat = torch.cat([v.double().reshape(-1) for v in values])
    dist.all_reduce(flat)
    parts = flat.split([v.numel() for v in values])
    return tuple(part.reshape(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True))
