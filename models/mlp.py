"""All inputs side by side through hidden layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.components import Inputs, InputSpec, Ranker
from engine.hookspecs import hookimpl
from models.layers import MLP, Heads, MLPOptions


class MLPRanker(Ranker):
    """Multi-layer perceptron over all inputs side by side, one linear logit a task."""

    name = "mlp"
    Options = MLPOptions

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: MLPOptions) -> None:
        super().__init__(inputs, tasks, options)
        self.body = MLP(inputs.width, options)
        self.heads = Heads(self.body.output_dim, tasks)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        return self.heads.logits(self.body(inputs.concat()))


@hookimpl
def rankers() -> list[type[Ranker]]:
    return [MLPRanker]
