"""Batch normalisation against torch's own, a row alone, and two processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from models.batch_norm import BatchNorm
from models.layers import MLP, MLPOptions


def rows(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(count)) * 4 + 1


def learned(norm: torch.nn.BatchNorm1d, x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradients of rows, weight and bias, and running statistics after one step with an uneven loss."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.square() * torch.arange(1, 4)).sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def test_one_process_is_torchs_batch_norm() -> None:
    for ours, theirs in zip(learned(BatchNorm(3), rows(9)), learned(torch.nn.BatchNorm1d(3), rows(9)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("count", [0, 1])
def test_a_row_alone_is_normalised_by_the_running_statistics(count: int) -> None:
    norm = BatchNorm(3)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    x = rows(count)
    torch.testing.assert_close(norm(x), (x - 2) / 2, atol=1e-4, rtol=1e-4)
    assert norm.running_mean.tolist() == [2.0] * 3


def _one_of_two(rank: int, address: str, parts: list[Tensor], answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    y, by_rows, by_weight, by_bias, mean, var = learned(BatchNorm(3), parts[rank])
    dist.all_reduce(by_weight)
    dist.all_reduce(by_bias)
    answers[rank] = [t.tolist() for t in (y, by_rows, by_weight, by_bias, mean, var)]
    dist.destroy_process_group()


@pytest.mark.parametrize("first", [9, 4, 0])
def test_two_processes_learn_as_one_does_on_all_rows_also_where_one_has_none(tmp_path: Path, first: int) -> None:
    x = rows(9)
    expected = learned(torch.nn.BatchNorm1d(3), x)
    with mp.get_context("spawn").Manager() as manager:
        answers = manager.dict()
        parts = [x[:first], x[first:]]
        mp.spawn(_one_of_two, args=(str(tmp_path / "meet"), parts, answers), nprocs=2)
        found = [[torch.tensor(t) for t in answers[rank]] for rank in (0, 1)]
    for place in (0, 1):  # a row's output and gradient
        both = torch.cat([part[place].reshape(-1, 3) for part in found])
        torch.testing.assert_close(both, expected[place], atol=1e-5, rtol=1e-5)
    for place in range(2, 6):  # summed gradients and running statistics, equal on both
        for part in found:
            torch.testing.assert_close(part[place], expected[place], atol=1e-4, rtol=1e-4)


def test_a_layer_before_the_normalisation_has_no_bias_that_only_noise_would_move() -> None:
    with_, without = (MLP(4, MLPOptions(hidden=(8,), batch_norm=norm)) for norm in (True, False))
    assert (with_[0].bias is None, without[0].bias is None) == (True, False)
