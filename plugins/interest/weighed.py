"""What attention models have in common: a weight for each item of the history, and the weighted sum."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel
from plugins.interest import ragged

_PAIRS_OF_A_USER = 1000
"""On the mean, from which on a user at a time is quicker: at 500 targets with histories of 50, 2.5 times as quick."""


class WeighedHistory(InterestModel):
    """Base of models that weigh the items of a history for a target; an option `max_history` bounds its length."""

    options: Any  # a subclass's own

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        history = self._newest(history)
        if torch.compiler.is_exporting():  # nothing that looks at the data: one graph for all of them
            return self._of_pairs(targets, history, user_of_target)
        if len(history.lengths()) == 1:
            return self._of_one_user(targets, history.values())
        counts = self._targets_of_users(history.lengths(), user_of_target)
        if counts is not None:
            users = zip(targets.split(counts), history.values().split(history.lengths().tolist()), strict=True)
            return torch.cat([self._of_one_user(its, past) for its, past in users if len(its)])
        return self._of_pairs(targets, history, user_of_target)

    def _of_pairs(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        pairs, values = ragged.pairs(history, user_of_target), history.values()
        weights = self._weights(targets, values, pairs)
        if torch.compiler.is_exporting():
            return ragged.weighted_sum(values, weights, pairs.offsets, pairs.item)
        return ragged.attend(pairs.items(values), weights, pairs)

    def _targets_of_users(self, lengths: Tensor, user_of_target: Tensor) -> list[int] | None:
        """Targets of each user where one user after the other is the quicker way: few users with many targets each,
        which lie in the users' order, without gradient on a CPU. None where all pairs together are."""
        if torch.is_grad_enabled() or self.training or lengths.is_cuda or len(lengths) == len(user_of_target):
            return None
        counts = torch.bincount(user_of_target, minlength=len(lengths))
        few = int((counts * lengths).sum()) < _PAIRS_OF_A_USER * len(lengths)
        if few or not bool((user_of_target[1:] >= user_of_target[:-1]).all()):
            return None
        found: list[int] = counts.tolist()
        return found

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        history = self._newest(history)
        pairs = ragged.pairs(history, user_of_target)
        weights = self._weights(targets, history.values(), pairs)
        return JaggedTensor(values=weights.unsqueeze(1), lengths=pairs.lengths)

    def _newest(self, history: JaggedTensor) -> JaggedTensor:
        return ragged.newest(history, self.options.max_history)

    @abstractmethod
    def _weights(self, targets: Tensor, history: Tensor, pairs: ragged.Pairs) -> Tensor:
        """targets [N, D], history [T, D] -> weights [P]."""

    @abstractmethod
    def _of_one_user(self, targets: Tensor, items: Tensor) -> Tensor:
        """One user's history meets all targets: targets [N, D], items [H, D] -> [N, D]."""
