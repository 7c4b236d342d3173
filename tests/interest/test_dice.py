"""Dice against numbers made by hand, its gradient against differences, two processes against one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from plugins.interest.dice import Dice, _Dice


def numpy_dice(s: np.ndarray, alpha: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Zhou et al. 2018, section 5.3, in float64."""
    p = 1 / (1 + np.exp(-(s - mean) / np.sqrt(var + 1e-8)))
    return p * s + (1 - p) * alpha * s


@pytest.mark.parametrize("rows", [2, 7, 5000])
def test_training_uses_the_statistics_of_the_batch(rows: int) -> None:
    s = np.random.default_rng(0).normal(2, 3, (rows, 5))
    dice = Dice(5)
    dice.alpha.data = torch.linspace(-0.5, 0.5, 5)
    expected = numpy_dice(s, np.linspace(-0.5, 0.5, 5), s.mean(0), s.var(0))
    np.testing.assert_allclose(dice(torch.tensor(s, dtype=torch.float32)).detach(), expected, rtol=2e-4, atol=2e-5)


def test_serving_uses_running_statistics_that_lag_behind_the_batches() -> None:
    random = np.random.default_rng(1)
    dice = Dice(3, momentum=0.25)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(3):
        batch = random.normal(1, 2, (50, 3))
        dice(torch.tensor(batch, dtype=torch.float32))
        mean, var = 0.75 * mean + 0.25 * batch.mean(0), 0.75 * var + 0.25 * batch.var(0)
    dice.eval()
    s = random.normal(0, 1, (9, 3))
    given = torch.tensor(s, dtype=torch.float32)
    np.testing.assert_allclose(dice(given).detach(), numpy_dice(s, np.zeros(3), mean, var), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the path without gradient overwrites its input
        np.testing.assert_allclose(dice(given), numpy_dice(s, np.zeros(3), mean, var), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 19])
def test_the_gradient_is_that_of_finite_differences_through_the_statistics(rows: int) -> None:
    random = torch.Generator().manual_seed(2)
    s = torch.randn(rows, 4, dtype=torch.float64, generator=random).requires_grad_()
    alpha = torch.rand(4, dtype=torch.float64, generator=random).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, a: _Dice.apply(s, a, 1e-8, False)[0], (s, alpha))


def test_one_row_alone_has_no_variance_and_still_a_gentle_gradient() -> None:
    """s = E[s], so p = 1/2 and f = s (1 + alpha) / 2 with the gradient g (1 + alpha) / 2: no 1 / sqrt(eps) in it."""
    s = torch.tensor([[3.7, -120.0]], requires_grad=True)
    Dice(2)(s).sum().backward()
    torch.testing.assert_close(s.grad, torch.tensor([[0.5, 0.5]]), atol=0.05, rtol=0)


def test_a_batch_without_rows_leaves_the_running_statistics_alone() -> None:
    dice = Dice(3)
    out = dice(torch.empty(0, 3, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert dice.running_mean.tolist() == [0, 0, 0]
    assert dice.running_var.tolist() == [1, 1, 1]


def _one_of_two(rank: int, address: str, answers: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    s, weights = _shared_batch()
    mine = slice(0, 5) if rank == 0 else slice(5, 13)
    part = s[mine].clone().requires_grad_()
    dice = Dice(4)
    out = dice(part)
    (out * weights[mine]).sum().backward()
    answers[rank] = (out.detach().numpy(), part.grad.numpy(), dice.alpha.grad.numpy(), dice.running_var.numpy())
    dist.destroy_process_group()


def _shared_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(13, 4, generator=random) * 2 + 1, torch.randn(13, 4, generator=random)


def test_two_processes_with_unequal_rows_agree_with_one(tmp_path) -> None:
    s, weights = _shared_batch()
    s.requires_grad_()
    dice = Dice(4)
    out = dice(s)
    (out * weights).sum().backward()
    with mp.get_context("spawn").Manager() as manager:
        answers = manager.dict()
        mp.spawn(_one_of_two, args=(str(tmp_path / "meet"), answers), nprocs=2)
        first, second = answers[0], answers[1]
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), out.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([first[1], second[1]]), s.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first[2] + second[2], dice.alpha.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first[3], dice.running_var, rtol=1e-5)
    np.testing.assert_allclose(second[3], dice.running_var, rtol=1e-5)
