"""DLRM: inner products of all pairs of fields, and the dense part, into a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

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
        pairs = np.stack(np.triu_indices(count, 1))  # by numpy: real also where modules are made on the meta device
        self.register_buffer("pairs", torch.from_numpy(pairs), persistent=False)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        vectors = self.vectors(inputs)
        beside = vectors[:, -1] if self.inputs.dense else vectors.flatten(1)
        return self.heads.logits(self.body(torch.cat([beside, self.products(vectors)], dim=1)))

    def products(self, vectors: Tensor) -> Tensor:
        """Inner products of all pairs i < j: [N, F, K] -> [N, F (F - 1) / 2]."""
        return torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [DLRMRanker]
