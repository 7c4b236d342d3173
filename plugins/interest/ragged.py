"""Arithmetic on histories of unequal length, without padding: pairs of (target, history item) and sums over segments.

A *segment* is the run of pairs that belongs to one target; pairs lie in the order of the targets, and within a target
in the order of its user's history. P pairs, N targets, U users, T history items in all.

Sizes are read as `x.shape[0]` where torch.export follows: `len(x)` would make a constant of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor


@dataclass
class Pairs:
    """Which history item meets which target.

    lengths [N]: pairs of each target; offsets [N + 1]: their running sum; target [P]: the target of each pair;
    item [P]: the pair's position in the history's values, None where pair p meets item p. All int64.
    """

    lengths: Tensor
    offsets: Tensor
    target: Tensor
    item: Tensor | None

    def items(self, values: Tensor) -> Tensor:
        """Values of the history [T, ...] as the pairs meet them -> [P, ...]."""
        return values if self.item is None else values.index_select(0, self.item)


def pairs(history: JaggedTensor, user_of_target: Tensor) -> Pairs:
    """All pairs; O(P) however unequal the histories are. No copy of the history where each user has one target."""
    lengths, offsets = history.lengths().long(), history.offsets().long()
    users = lengths.shape[0]
    targets = torch.arange(user_of_target.shape[0], device=lengths.device)
    alike = not torch.compiler.is_exporting() and users == len(targets)
    if alike and torch.equal(user_of_target, targets):
        total = len(history.values())
        return Pairs(lengths, offsets, torch.repeat_interleave(targets, lengths, output_size=total), None)
    lengths = lengths[user_of_target]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    target = torch.repeat_interleave(targets, lengths)
    within = torch.arange(target.shape[0], device=lengths.device) - starts[target]
    return Pairs(lengths, starts, target, offsets[user_of_target][target] + within)


def newest(history: JaggedTensor, most: int) -> JaggedTensor:
    """The first `most` items of each user's history; histories come newest first."""
    lengths = history.lengths()
    if not torch.compiler.is_exporting() and (not len(lengths) or int(lengths.max()) <= most):
        return history
    total = history.values().shape[0]
    users = torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths, output_size=total)
    within = torch.arange(total, device=lengths.device) - history.offsets()[users]
    lengths = lengths.clamp(max=most)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return JaggedTensor(values=history.values()[within < most], lengths=lengths, offsets=offsets)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of runs: values [P, K], offsets [N + 1] -> [N, K]; an empty run gives zeros."""
    return weighted_sum(values, None, offsets)


def weighted_sum(values: Tensor, weights: Tensor | None, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    """sum of weights[p] * values[p] over each run: values [P, K], weights [P] or None, offsets [N + 1] -> [N, K].

    rows int64 [P]: values [T, K] are those of rows[p] in place of p.
    One fused kernel; on a CPU several times as fast as `index_add` or `segment_reduce`.
    """
    if rows is None:
        rows = torch.arange(values.shape[0], device=values.device)
    return F.embedding_bag(rows, values, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def mean(history: JaggedTensor) -> Tensor:
    """Mean of each user's history: values [T, D] over U users -> [U, D]; an empty history gives zeros."""
    lengths = history.lengths()
    users = torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=lengths.device), lengths, output_size=history.values().shape[0]
    )
    ones = history.values().new_ones(users.shape[0])
    total = _Intensity.apply(history.values(), ones, users, history.offsets().long())
    return total / lengths.clamp(min=1).unsqueeze(1)


class _Repeat(torch.autograd.Function):
    """Rows of targets, once a pair; the gradient is a sum of runs, which is cheaper than the scatter of a gather."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return values.index_select(0, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return segment_sum(gradient.contiguous(), offsets), None, None


class _Intensity(torch.autograd.Function):
    """`weighted_sum` with a gradient of two elementwise passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, weights, target)
        return weighted_sum(values, weights, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, weights, target = ctx.saved_tensors
        spread = gradient.index_select(0, target)
        by_weight = (values * spread).sum(1) if ctx.needs_input_grad[1] else None
        by_value = spread.mul_(weights.unsqueeze(1)) if ctx.needs_input_grad[0] else None
        return by_value, by_weight, None, None


def repeat(values: Tensor, of: Pairs) -> Tensor:
    """Values of the targets [N, K], once a pair -> [P, K]."""
    return _Repeat.apply(values, of.target, of.offsets)


def attend(values: Tensor, weights: Tensor, of: Pairs) -> Tensor:
    """Weighted sum of each target's history: values [P, K], weights [P] -> [N, K]; differentiable in both."""
    return _Intensity.apply(values, weights, of.target, of.offsets)


def segment_softmax(logits: Tensor, of: Pairs) -> Tensor:
    """Softmax over each target's pairs: logits [P] -> weights [P] that sum to one a target."""
    if torch.compiler.is_exporting():
        lowest = logits.new_full((of.lengths.shape[0],), -torch.inf)
        top = lowest.scatter_reduce(0, of.target, logits, "amax")
    elif not len(logits):
        return logits
    else:
        top = torch.segment_reduce(logits.detach(), "max", lengths=of.lengths, axis=0, unsafe=True, initial=-torch.inf)
    weights = torch.exp(logits - top.index_select(0, of.target))
    total = repeat(_sum_of(weights, of), of).squeeze(1)
    return weights / total


def _sum_of(weights: Tensor, of: Pairs) -> Tensor:
    """[P] -> [N, 1]."""
    return attend(torch.ones_like(weights).unsqueeze(1), weights, of)
