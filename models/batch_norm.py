"""Batch normalisation that knows of other processes and of small batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation with the statistics of all processes' rows, so that one process and two learn the same.

    Shapes: [N, C] -> [N, C]. A batch of one row, over all processes, has no variance: it is normalised by the running
    statistics, as in serving (an epoch's last batch may be that small). Every process must call it equally often in
    training, also with no rows. torch's SyncBatchNorm is for GPUs only. Source: Ioffe and Szegedy 2015, algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_processes(x)
        return super().forward(x) if len(x) > 1 else self._by_running_statistics(x)

    def _over_processes(self, x: Tensor) -> Tensor:
        sums = _Sum.apply(torch.cat([x.new_tensor([len(x)]), x.sum(0)]))
        rows = sums[0].detach()
        if rows <= 1:
            return self._by_running_statistics(x)
        mean = sums[1:] / rows
        centred = x - mean
        var = _Sum.apply(centred.square().sum(0)) / rows
        with torch.no_grad():
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (rows / (rows - 1)), self.momentum)
        return torch.addcmul(self.bias, centred * torch.rsqrt(var + self.eps), self.weight)

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _Sum(torch.autograd.Function):
    """A sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total
