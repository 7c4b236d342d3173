"""DCN-V2: feature crosses of bounded degree beside, or before, a deep network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.components import Inputs, InputSpec, Ranker
from engine.hookspecs import hookimpl
from models.layers import MLP, Heads, MLPOptions


class DCNv2Ranker(Ranker):
    """Deep and cross network V2: each cross layer raises the degree of the feature products by one.

    Shapes: all inputs side by side [N, W] -> [N] a task. `stacked` feeds the crosses to the deep network, `parallel`
    sets both side by side. Source: Wang et al. 2021, eq. 1-3, fig. 1.
    """

    name = "dcnv2"

    class Options(MLPOptions):
        crosses: int = Field(2, ge=1, le=8, description="cross layers; the paper's best on Criteo are 2-3")
        rank: int = Field(0, ge=0, description="rank of the crosses' matrices U V; 0: full")
        structure: Literal["stacked", "parallel"] = Field("parallel", description="deep after the crosses or beside")

    options: Options

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: Options) -> None:
        super().__init__(inputs, tasks, options)
        self.crosses = nn.ModuleList(Cross(inputs.width, options.rank) for _ in range(options.crosses))
        self.body = MLP(inputs.width, options)
        beside = inputs.width if options.structure == "parallel" else 0
        self.heads = Heads(self.body.output_dim + beside, tasks)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        start = x = inputs.concat()
        for cross in self.crosses:
            x = cross(start, x)
        if self.options.structure == "stacked":
            return self.heads.logits(self.body(x))
        return self.heads.logits(torch.cat([x, self.body(start)], dim=1))


class Cross(nn.Module):
    """x_next = x0 * (W x + b) + x, with W = U V of a given rank or full; [N, W], [N, W] -> [N, W]."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, rank, bias=False) if rank else nn.Identity()
        self.linear = nn.Linear(rank or width, width)

    def forward(self, start: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, start, self.linear(self.narrow(x)))


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [DCNv2Ranker]
