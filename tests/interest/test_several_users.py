"""Several users with many targets each, as a server meets them: what each has alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.plugins import Plugins
from plugins.interest import ragged
from plugins.interest.weighed import WeighedHistory

DIM = 8


def model(plugins: Plugins, name: str) -> WeighedHistory:
    torch.manual_seed(3)
    method = plugins.get("interests", name)
    made: WeighedHistory = method(DIM, method.Options()).eval().requires_grad_(False)
    return made


def world(counts: list[int], lengths: list[int]) -> tuple[Tensor, JaggedTensor, Tensor]:
    torch.manual_seed(5)
    history = JaggedTensor(values=torch.randn(sum(lengths), DIM), lengths=torch.tensor(lengths))
    users = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.randn(sum(counts), DIM), history, users


def pairs_together(interest: WeighedHistory, targets: Tensor, history: JaggedTensor, users: Tensor) -> Tensor:
    pairs = ragged.pairs(history, users)
    weights = interest._weights(targets, history.values(), pairs)
    return ragged.attend(pairs.items(history.values()), weights, pairs)


@pytest.mark.parametrize("name", ["din", "attention"])
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([300, 40, 500], [50, 50, 50]), ([400, 0, 200], [20, 9, 13]), ([900, 800], [0, 50]), ([2, 1], [3, 4])],
    ids=["many", "a user without targets", "a user without history", "few"],
)
def test_each_user_gets_what_all_pairs_together_give(
    plugins: Plugins, name: str, counts: list[int], lengths: list[int]
) -> None:
    interest = model(plugins, name)
    targets, history, users = world(counts, lengths)
    with torch.inference_mode():
        found = interest(targets, history, users)
        torch.testing.assert_close(found, pairs_together(interest, targets, history, users), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["din", "attention"])
def test_one_user_after_the_other_is_taken_where_they_have_many_targets(
    plugins: Plugins, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interest = model(plugins, name)
    asked: list[int] = []
    alone = interest._of_one_user
    monkeypatch.setattr(interest, "_of_one_user", lambda t, h: asked.append(len(t)) or alone(t, h))
    with torch.inference_mode():
        interest(*world([300, 40], [50, 50]))
        assert asked == [300, 40]
        interest(*world([3, 4], [50, 50]))
        assert asked == [300, 40]
        targets, history, users = world([300, 40], [50, 50])
        mixed = torch.randperm(len(targets))
        found = interest(targets[mixed], history, users[mixed])
        assert asked == [300, 40]
        torch.testing.assert_close(found, interest(targets, history, users)[mixed], atol=1e-5, rtol=1e-5)
    interest.train()
    targets, history, users = world([300, 40], [50, 50])
    interest(targets, history, users)
    assert asked == [300, 40, 300, 40]
