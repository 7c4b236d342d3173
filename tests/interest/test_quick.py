"""The layer through oneDNN says what torch's own says, and rounding its shapes does not show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from plugins.interest import quick
from plugins.interest.din import DINInterest


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_linear_is_torchs(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 16), torch.randn(33, 16), torch.randn(33)
    with torch.inference_mode():
        torch.testing.assert_close(quick.linear(x, weight, bias), F.linear(x, weight, bias))
        wide = quick.linear(x.double(), weight.double(), bias.double())
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("targets", "length"), [(1, 1), (3, 0), (500, 50), (513, 49), (2000, 11), (0, 4)])
def test_din_in_blocks_is_din_in_one(targets: int, length: int, softmax: bool) -> None:
    torch.manual_seed(targets)
    din = DINInterest(16, DINInterest.Options(softmax=softmax, scale=0.5)).eval()
    for activation in din.activations:
        activation.running_mean.normal_()
        activation.alpha.data.normal_()
    wanted = _answer(din, targets, length)
    din.settle()
    with torch.inference_mode():
        torch.testing.assert_close(_answer(din, targets, length), wanted.detach(), atol=1e-5, rtol=1e-5)


def _answer(din: DINInterest, targets: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    items = torch.randn(length, 16, generator=generator)
    history = JaggedTensor(values=items, lengths=torch.tensor([length]))
    found: Tensor = din(torch.randn(targets, 16, generator=generator), history, torch.zeros(targets, dtype=torch.int64))
    return found
