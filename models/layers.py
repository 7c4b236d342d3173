"""Layers that several networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from engine.components import Inputs, InputSpec, PluginOptions
from models.batch_norm import BatchNorm

Activation = Literal["relu", "prelu", "gelu", "silu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class MLPOptions(PluginOptions):
    """Options of a network with hidden layers."""

    hidden: tuple[PositiveInt, ...] = Field((128, 64), description="widths of the hidden layers")
    activation: Activation = Field("relu", description="after each hidden layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden units dropped in training")
    batch_norm: bool = Field(False, description="batch normalisation before each activation")


class MLP(nn.Sequential):
    """Hidden layers [N, width] -> [N, output_dim]; with `out`, a last linear layer of that width."""

    def __init__(self, width: int, options: MLPOptions, hidden: Sequence[int] | None = None, out: int | None = None):
        layers: list[nn.Module] = []
        for units in options.hidden if hidden is None else hidden:
            # normalisation takes a bias out again: its gradient is rounding error, which Adam would make whole steps of
            layers.append(nn.Linear(width, units, bias=not options.batch_norm))
            if options.batch_norm:
                layers.append(BatchNorm(units))
            layers.append(_ACTIVATIONS[options.activation]())
            if options.dropout:
                layers.append(nn.Dropout(options.dropout))
            width = units
        if out is not None:
            layers.append(nn.Linear(width, out))
            width = out
        super().__init__(*layers)
        self.output_dim = width


class Heads(nn.Linear):
    """One linear logit a task: [N, width] -> task -> [N]."""

    def __init__(self, width: int, tasks: Sequence[str]) -> None:
        super().__init__(width, len(tasks))
        self.tasks = list(tasks)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.tasks, self(x).unbind(1), strict=True))


class EqualWidths(nn.Module):
    """A linear projection a field, so that fields of any width meet in one: -> [N, F, dim].

    The dense columns, where there are any, count as one more field, the last; `dense` is the network that makes it.
    Fields of one width are projected together and stand behind one another, in the order of their widths' first.

    It is also what keeps a multiplexed table readable: rows that several features share are told apart by the
    features' own projections (Coleman et al. 2023, section 4.2: collisions between features vanish at the read-out if
    each is read by weights of its own).
    """

    def __init__(self, inputs: InputSpec, dim: int, dense: nn.Module | None = None) -> None:
        super().__init__()
        self.names: dict[int, list[str]] = {}
        drawn: dict[int, list[Tensor]] = {}
        for name, width in inputs.fields.items():
            self.names.setdefault(width, []).append(name)
            drawn.setdefault(width, []).append(nn.Linear(width, dim, bias=False).weight.T)
        self.weights = nn.ParameterList(torch.stack(weights).detach() for weights in drawn.values())
        self.dense = (dense or nn.Linear(inputs.dense, dim)) if inputs.dense else None
        self.count = len(inputs.fields) + bool(inputs.dense)

    def forward(self, inputs: Inputs) -> Tensor:
        vectors = [
            torch.bmm(inputs.beside(names).view(-1, len(names), width).transpose(0, 1), weight)
            for (width, names), weight in zip(self.names.items(), self.weights, strict=True)
        ]
        if self.dense is not None:
            vectors.append(self.dense(inputs.dense).unsqueeze(0))
        return (torch.cat(vectors) if len(vectors) > 1 else vectors[0]).transpose(0, 1)
