"""Both plugins keep plexrank's contracts and do what they say."""

from __future__ import annotations

import torch
from acme_plexrank.editorial import EditorialSource
from acme_plexrank.recency import RecencyInterest
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.testing import check_interest, check_source


def test_recency_keeps_the_contract_of_an_interest() -> None:
    check_interest(RecencyInterest)


def test_editorial_keeps_the_contract_of_a_source() -> None:
    check_source(EditorialSource, EditorialSource.Options(items=["1", "2", "no-such-item"]))


def test_an_item_one_half_life_older_weighs_half() -> None:
    model = RecencyInterest(1, RecencyInterest.Options(half_life=1.0))
    history = JaggedTensor(values=torch.tensor([[7.0], [0.0]]), lengths=torch.tensor([2]))
    got = model(torch.zeros(1, 1), history, torch.tensor([0]))
    torch.testing.assert_close(got, torch.tensor([[7.0 * 2 / 3]]))  # weights 1 and 1/2, that is 2/3 and 1/3
