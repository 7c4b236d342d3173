"""logQ correction, masks, and the probabilities that the sampler claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import PluginError
from engine.training.retrieval_step import false_negatives
from plugins.losses.sampled_softmax import SampledSoftmax
from plugins.samplers.mixed import MixedSampler

ITEMS = 30


def full_gradient(scores: torch.Tensor, positive: int) -> np.ndarray:
    """Gradient of -log softmax over the whole catalogue."""
    p = torch.softmax(scores.double(), 0).numpy().copy()
    p[positive] -= 1
    return p


def sampled_gradient(scores: torch.Tensor, positive: int, counts: np.ndarray, logq: bool) -> np.ndarray:
    """Mean gradient over many draws of negatives by popularity and uniformly."""
    sampler = MixedSampler(MixedSampler.Options(uniform=200, popular=800, power=1.0), counts, seed=1)
    loss = SampledSoftmax(SampledSoftmax.Options(logq=logq))
    total = np.zeros(ITEMS)
    draws = 60
    for _ in range(draws):
        items, log_q = sampler.sample(torch.tensor([positive]))
        leaf = scores.clone().requires_grad_()
        mask = false_negatives(torch.tensor([positive]), items, None)
        loss(leaf[items].unsqueeze(0), torch.tensor([0]), log_q=log_q, mask=mask).backward()
        total += leaf.grad.numpy()
    return total / draws


def test_logq_correction_recovers_the_gradient_of_the_full_softmax() -> None:
    counts = (1000 / np.arange(1, ITEMS + 1) ** 1.2).astype(np.int64)
    scores = torch.randn(ITEMS, generator=torch.Generator().manual_seed(0))
    expected = full_gradient(scores, 3)
    corrected = sampled_gradient(scores, 3, counts, logq=True)
    plain = sampled_gradient(scores, 3, counts, logq=False)
    assert np.abs(corrected - expected).max() < 0.01
    assert np.abs(plain - expected).max() > 0.05  # popular items pushed down too much


def test_the_sampler_draws_as_often_as_it_says() -> None:
    counts = np.array([50, 30, 15, 5, 0])
    sampler = MixedSampler(MixedSampler.Options(uniform=20, popular=20, power=0.5), counts, seed=3)
    drawn, claimed = np.zeros(5), np.full(5, np.nan)
    random = np.random.default_rng(4)
    for _ in range(2000):
        positives = torch.from_numpy(random.choice(5, size=11, p=counts / counts.sum()))
        items, log_q = sampler.sample(positives)
        rows = items.numpy()
        np.add.at(drawn, rows[1:], 1)  # what the first row's user meets: all columns but its own
        claimed[rows] = np.exp(log_q.numpy())
    np.testing.assert_allclose(drawn / drawn.sum(), claimed, rtol=0.05)


def test_what_a_user_likes_elsewhere_in_the_batch_is_no_negative() -> None:
    positives = torch.tensor([7, 8, 7, 9])
    users = torch.tensor([1, 1, 2, 3])
    items = torch.tensor([7, 8, 7, 9, 8, 5])  # the last two were drawn
    mask = false_negatives(positives, items, users)
    assert mask.int().tolist() == [
        [0, 1, 1, 0, 1, 0],  # user 1 likes 7 and 8: every other column that holds one
        [1, 0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],  # user 2 likes 7
        [0, 0, 0, 0, 0, 0],
    ]


def test_one_user_and_one_item_in_a_whole_batch_cost_no_more_than_the_mask() -> None:
    """All pairs of rows times all equal columns would be 4096 ** 3 places."""
    positives = torch.full((4096,), 3)
    mask = false_negatives(positives, positives, torch.zeros(4096, dtype=torch.int64))
    assert torch.equal(mask, ~torch.eye(4096, dtype=torch.bool))


def test_masked_columns_leave_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 5.0]])
    mask = torch.tensor([[False, False, True]])
    value = SampledSoftmax(SampledSoftmax.Options())(logits, torch.tensor([0]), mask=mask)
    assert value.item() == pytest.approx(np.log(1 + np.exp(-1)), abs=1e-6)


def test_an_empty_catalogue_is_an_error_that_says_so() -> None:
    with pytest.raises(PluginError, match="catalogue is empty"):
        MixedSampler(MixedSampler.Options(), np.empty(0, np.int64), 0)
