"""What attention models have in common: a weight for each item of the history, and the weighted sum."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel
from plugins.interest import ragged


class WeighedHistory(InterestModel):
    """Base of models that weigh the items of a history for a target; an option `max_history` bounds its length."""

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        history = self._newest(history)
        if len(history.lengths()) == 1:
            return self._of_one_user(targets, history.values())
        pairs = ragged.pairs(history, user_of_target)
        items = pairs.items(history.values())
        return ragged.attend(items, self._weights(targets, items, pairs), pairs)

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        history = self._newest(history)
        pairs = ragged.pairs(history, user_of_target)
        weights = self._weights(targets, pairs.items(history.values()), pairs)
        return JaggedTensor(values=weights.unsqueeze(1), lengths=pairs.lengths)

    def _newest(self, history: JaggedTensor) -> JaggedTensor:
        return ragged.newest(history, self.options.max_history)

    @abstractmethod
    def _weights(self, targets: Tensor, items: Tensor, pairs: ragged.Pairs) -> Tensor:
        """targets [N, D], items [P, D] as the pairs meet them -> weights [P]."""

    @abstractmethod
    def _of_one_user(self, targets: Tensor, items: Tensor) -> Tensor:
        """One user's history meets all targets: targets [N, D], items [H, D] -> [N, D]."""
