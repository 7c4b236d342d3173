"""Logloss against its formula."""

from __future__ import annotations

import numpy as np
import torch

from plugins.losses.bce import BinaryCrossEntropy


def test_logloss_is_the_weighted_mean_of_minus_log_likelihood() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=9), (random.random(9) < 0.5).astype(float)
    p = 1 / (1 + np.exp(-logits))
    each = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    weight = random.random(9)
    loss = BinaryCrossEntropy(BinaryCrossEntropy.Options())
    tensors = [torch.tensor(v, dtype=torch.float32) for v in (logits, labels, weight)]
    np.testing.assert_allclose(loss(*tensors[:2]), each.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(*tensors), (each * weight).sum() / weight.sum(), rtol=1e-5)


def test_rows_of_no_weight_at_all_cost_nothing() -> None:
    loss = BinaryCrossEntropy(BinaryCrossEntropy.Options())
    logits = torch.ones(3, requires_grad=True)
    value = loss(logits, torch.zeros(3), torch.zeros(3))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()
