"""DLRM: inner products of all pairs of fields, and the dense part, into a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.components import Inputs, InputSpec, Ranker
from engine.hookspecs import hookimpl
from models.layers import MLP, EqualWidths, Heads, MLPOptions


class DLRMRanker(Ranker):
    """Deep learning recommendation model: pairwise inner products of fields beside the dense part, then a network.

    Shapes: fields [N, width each], dense [N, M] -> [N] a task. The dense columns pass the bottom network and meet the
    fields as one of them. What the top network reads: the bottom's output (without dense columns: all fields) and the
    F (F - 1) / 2 products.

    Fields are projected to one width, each by weights of its own: inner products need equal widths, and would take
    from a multiplexed table the protection of separate read-outs. Source: Naumov et al. 2019, section 2.
    """

    name = "dlrm"

    class Options(MLPOptions):
        bottom: tuple[PositiveInt, ...] = Field((64,), description="hidden layers of the dense columns' network")
        product_dim: int = Field(16, gt=0, description="width in which fields meet")

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: Options) -> None:
        super().__init__(inputs, tasks, options)
        dim = options.product_dim
        bottom = MLP(inputs.dense, options, options.bottom, out=dim) if inputs.dense else None
        self.vectors = EqualWidths(inputs, dim, dense=bottom)
        count = self.vectors.count
        beside = dim if inputs.dense else count * dim
        self.body = MLP(beside + count * (count - 1) // 2, options)
        self.heads = Heads(self.body.output_dim, tasks)
        self.pairs: Tensor
        self.pair_of: Tensor
        pairs, pair_of = _pairs(count)
        self.register_buffer("pairs", torch.from_numpy(pairs), persistent=False)
        self.register_buffer("pair_of", torch.from_numpy(pair_of), persistent=False)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        vectors = self.vectors(inputs)
        beside = vectors[:, -1] if self.inputs.dense else vectors.flatten(1)
        return self.heads.logits(self.body(torch.cat([beside, self.products(vectors)], dim=1)))

    def products(self, vectors: Tensor) -> Tensor:
        """Inner products of all pairs i < j: [N, F, K] -> [N, F (F - 1) / 2]."""
        found: Tensor = _Products.apply(vectors, self.pairs, self.pair_of)
        return found


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the pairs i < j in a flat [count, count], and for each place its pair, on the diagonal one past the
    last. By numpy: real also where modules are made on the meta device."""
    i, j = np.triu_indices(count, 1)
    pair_of = np.full((count, count), len(i))
    pair_of[i, j] = pair_of[j, i] = np.arange(len(i))
    return i * count + j, pair_of.reshape(-1)


class _Products(torch.autograd.Function):
    """Products of pairs by one matrix product each way; autograd would scatter the gradient to a triangle first, which
    takes twice as long in all."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, pairs: Tensor, pair_of: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, pair_of)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, pair_of = ctx.saved_tensors
        fields = vectors.shape[1]
        whole = F.pad(gradient, (0, 1)).index_select(1, pair_of).view(-1, fields, fields)
        return torch.bmm(whole, vectors), None, None


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [DLRMRanker]
