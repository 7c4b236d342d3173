"""The mean of the history."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel, PluginOptions
from engine.hookspecs import hookimpl
from plugins.interest import ragged


class MeanInterest(InterestModel):
    """The mean of the history: the baseline that attention has to beat.

    Shapes: targets [N, D], history [T, D] over U users -> [N, D]; a user without history gives zeros. The mean is taken
    once a user, whatever the number of targets.
    """

    name = "mean"

    class Options(PluginOptions):
        max_history: int = Field(100, gt=0, description="newest items kept")

    options: Options

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        history = ragged.newest(history, self.options.max_history)
        return ragged.mean(history).index_select(0, user_of_target)

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        pairs = ragged.pairs(ragged.newest(history, self.options.max_history), user_of_target)
        share = 1.0 / pairs.lengths.clamp(min=1)
        return JaggedTensor(values=share[pairs.target].unsqueeze(1), lengths=pairs.lengths)


@hookimpl
def interests() -> list[type[InterestModel]]:
    return [MeanInterest]
