"""MMoE: shared experts, mixed by a gate of each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from engine.components import Inputs, InputSpec, Ranker
from engine.hookspecs import hookimpl
from models.layers import MLP, MLPOptions


class MMoERanker(Ranker):
    """Multi-gate mixture of experts: every task mixes shared experts by a gate of its own, then has its own tower.

    Shapes: all inputs side by side [N, W] -> [N] a task. Source: Ma et al. 2018, eq. 6-8. `hidden` are the layers of an
    expert. It is made for two or more tasks; with one it is a gated ensemble.
    """

    name = "mmoe"

    class Options(MLPOptions):
        experts: int = Field(4, ge=1, le=64, description="experts that all tasks share")
        tower: tuple[PositiveInt, ...] = Field((32,), description="hidden layers of each task's tower")

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: Options) -> None:
        super().__init__(inputs, tasks, options)
        experts = [MLP(inputs.width, options) for _ in range(options.experts)]
        self.experts = nn.ModuleList(experts)
        width = experts[0].output_dim
        self.gates = nn.ModuleList(nn.Linear(inputs.width, options.experts) for _ in tasks)
        self.towers = nn.ModuleList(MLP(width, options, options.tower, out=1) for _ in tasks)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        x = inputs.concat()
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        return {
            task: tower(torch.einsum("ne,nek->nk", torch.softmax(gate(x), dim=1), experts)).squeeze(1)
            for task, gate, tower in zip(self.tasks, self.gates, self.towers, strict=True)
        }


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [MMoERanker]
