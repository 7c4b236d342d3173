"""Two towers: users and items into one space."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from torch import Tensor

from engine.components import Encoder, Inputs, InputSpec
from engine.hookspecs import hookimpl
from models.layers import MLP, MLPOptions


class TwoTowerEncoder(Encoder):
    """Two towers: a network over the user's fields (the mean of the history among them), one over the item's.

    Shapes: user fields [U, W_u] -> [U, dim], item fields [M, W_i] -> [M, dim]. No layers in common but the embedding
    tables, so items are encoded once and found by an index. Source: Covington et al. 2016; Yi et al. 2019, section 3.
    """

    name = "two_tower"

    class Options(MLPOptions):
        hidden: tuple[PositiveInt, ...] = Field((64,), description="widths of the hidden layers of each tower")
        dim: int = Field(32, gt=0, le=1024, description="width of the common space")

    def __init__(self, user: InputSpec, item: InputSpec, options: Options) -> None:
        super().__init__(user, item, options)
        self.user_tower = MLP(user.width, options, out=options.dim)
        self.item_tower = MLP(item.width, options, out=options.dim)
        self.output_dim = options.dim

    def users(self, inputs: Inputs) -> Tensor:
        return self.user_tower(inputs.concat())

    def items(self, inputs: Inputs) -> Tensor:
        return self.item_tower(inputs.concat())


@hookimpl
def encoders() -> list[type[Encoder]]:
    return [TwoTowerEncoder]
