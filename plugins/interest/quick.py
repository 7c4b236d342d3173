"""A linear layer for serving, through oneDNN where torch has it: MKL, torch's first choice, is half as quick on AMD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [P, A], weight [C, A], bias [C] -> x W^T + bias [P, C], float32, without gradient.

    oneDNN compiles a kernel a shape (0.2-0.5 ms) and keeps 1,024 of them: call it with few shapes, see `rounded`.
    """
    if not _AVAILABLE or x.device.type != "cpu" or x.dtype != torch.float32 or not len(x):
        return F.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def rounded(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


def padded(rows: Tensor, n: int) -> Tensor:
    """[m, D] -> [n, D], zeros behind."""
    return rows if len(rows) == n else F.pad(rows, (0, 0, 0, n - len(rows)))
