"""Sums, repeats and softmaxes over runs of unequal length, and their gradients."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from plugins.interest import ragged

LENGTHS = torch.tensor([2, 0, 3, 1])


def _pairs() -> ragged.Pairs:
    history = JaggedTensor(values=torch.zeros(6, 2), lengths=LENGTHS)
    return ragged.pairs(history, torch.arange(4))


def test_pairs_follow_the_targets_and_find_their_users_items() -> None:
    history = JaggedTensor(values=torch.arange(6.0).unsqueeze(1), lengths=LENGTHS)
    found = ragged.pairs(history, torch.tensor([2, 0, 2, 1]))
    assert found.target.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert found.items(history.values())[:, 0].tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert found.lengths.tolist() == [3, 2, 3, 0]


def test_as_many_users_as_targets_in_another_order_are_not_taken_for_one_each() -> None:
    history = JaggedTensor(values=torch.arange(6.0).unsqueeze(1), lengths=LENGTHS)
    found = ragged.pairs(history, torch.tensor([3, 2, 1, 0]))
    assert found.items(history.values())[:, 0].tolist() == [5, 2, 3, 4, 0, 1]


def test_sums_repeats_and_softmax_have_the_gradient_of_finite_differences() -> None:
    of = _pairs()
    random = torch.Generator().manual_seed(0)
    values = torch.randn(6, 3, dtype=torch.float64, generator=random).requires_grad_()
    weights = torch.randn(6, dtype=torch.float64, generator=random).requires_grad_()
    targets = torch.randn(4, 3, dtype=torch.float64, generator=random).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: ragged.attend(v, w, of), (values, weights))
    assert torch.autograd.gradcheck(lambda t: ragged.repeat(t, of), (targets,))
    assert torch.autograd.gradcheck(lambda w: ragged.segment_softmax(w, of), (weights,))


def test_softmax_weights_of_a_target_sum_to_one_even_for_large_logits() -> None:
    weights = ragged.segment_softmax(torch.tensor([1000.0, 999.0, -1000.0, 0.0, 0.0, 5.0]), _pairs())
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(ragged.segment_sum(weights.unsqueeze(1), _pairs().offsets)[:, 0],
                               torch.tensor([1.0, 0.0, 1.0, 1.0]))  # fmt: skip
