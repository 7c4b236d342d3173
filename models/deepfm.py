"""DeepFM: a factorisation machine and a deep network over the same vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.components import Inputs, InputSpec, Ranker
from engine.hookspecs import hookimpl
from models.layers import MLP, EqualWidths, Heads, MLPOptions


class DeepFMRanker(Ranker):
    """DeepFM: first order + all inner products of two fields + a deep network, added up to one logit a task.

    Shapes: fields [N, width each], dense [N, M] -> [N]. The dense columns count as one more field.

    Fields are projected to one width, each by weights of its own, because an inner product needs equal widths and
    because a multiplexed table needs it to keep features apart. With several tasks the second-order term is a weighted
    sum over the K dimensions of the vectors, one set of weights a task, that starts as the plain sum.
    Source: Guo et al. 2017, eq. 2-4; the pair sum in O(fields), Rendle 2010, lemma 3.1.
    """

    name = "deepfm"

    class Options(MLPOptions):
        fm_dim: int = Field(16, gt=0, description="width in which fields meet")

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: Options) -> None:
        super().__init__(inputs, tasks, options)
        self.vectors = EqualWidths(inputs, options.fm_dim)
        self.first_order = Heads(inputs.width, tasks)
        self.body = MLP(inputs.width, options)
        self.deep = Heads(self.body.output_dim, tasks)
        self.second_order = torch.nn.Parameter(torch.ones(len(tasks), options.fm_dim))

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        x = inputs.concat()
        pairs = pair_products(self.vectors(inputs)) @ self.second_order.T
        logits = self.first_order(x) + pairs + self.deep(self.body(x))
        return dict(zip(self.tasks, logits.unbind(1), strict=True))


def pair_products(vectors: Tensor) -> Tensor:
    """Sum over all pairs i < j of v_i * v_j, elementwise: [N, F, K] -> [N, K], in O(F)."""
    made: Tensor = _PairProducts.apply(vectors)
    return made


class _PairProducts(torch.autograd.Function):
    """The derivative by v_i is the sum of all others: two passes over the vectors, where autograd would make six."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        total = vectors.sum(1)
        ctx.save_for_backward(vectors, total)
        return 0.5 * (total.square() - vectors.square().sum(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        vectors, total = ctx.saved_tensors
        others: Tensor = (total.unsqueeze(1) - vectors).mul_(gradient.unsqueeze(1))
        return others


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [DeepFMRanker]
