"""The ranking model: fields, repetition of a request's side, interest, frozen form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.batch import keyed_jagged
from engine.components import Inputs, InputSpec
from engine.errors import SchemaError
from engine.hashing import fingerprints
from engine.model import RankingModel, build_model, mean_pool
from engine.plugins import installed
from tests.training.small import SmallPrepared, serving_batch, small_config

STATISTICS = SmallPrepared().statistics


def build(**sections: Any) -> RankingModel:
    return build_model(small_config(**sections), STATISTICS, installed())


@pytest.mark.parametrize("embedding", ["full", "hashing", "unified"])
@pytest.mark.parametrize("interest", ["mean", "din", None])
def test_the_frozen_form_scores_as_the_model_does(embedding: str, interest: str | None) -> None:
    model = build(embedding={"name": embedding, "dim": 8}, interest=interest and {"name": interest}).eval()
    frozen = model.freeze()
    assert not any(p.requires_grad for p in frozen.parameters())
    for batch in (SmallPrepared().batch(np.arange(20)), serving_batch(9), serving_batch(1, history=0)):
        expected = model(batch)["click"].detach()
        assert expected.shape == (batch.targets,)
        torch.testing.assert_close(frozen(batch)["click"], expected, atol=1e-6, rtol=0)


def test_a_user_and_many_candidates_score_as_that_many_rows_of_one_candidate() -> None:
    """The request's side looked up once gives what looking it up for each candidate gives."""
    model, together = build().eval(), serving_batch(12)
    at_once = model(together)["click"]
    columns = together.ids.to_dict()
    for n in (0, 7, 11):
        alone = serving_batch(1)
        alone.ids = keyed_jagged(
            {
                "user": (columns["user"].values(), None),
                "item": (columns["item"].values()[n : n + 1], None),
                "tags": (columns["tags"].values()[n : n + 1], np.ones(1, np.int64)),
                "history": (columns["history"].values(), columns["history"].lengths()),
            }
        )
        torch.testing.assert_close(model(alone)["click"][0], at_once[n], atol=1e-6, rtol=0)


def test_as_many_users_as_targets_may_still_be_in_another_order() -> None:
    """Two requests, two targets, both of the second request: not the identity."""
    model = build(interest={"name": "mean"}).eval()
    batch = SmallPrepared().batch(np.arange(2))
    batch.user_of_target = torch.tensor([1, 1])
    swapped = model(batch)["click"].detach()
    batch.user_of_target = torch.tensor([0, 1])
    straight = model(batch)["click"].detach()
    assert swapped[1] == pytest.approx(straight[1].item(), abs=1e-6)
    assert swapped[0] != pytest.approx(straight[0].item(), abs=1e-7)


def test_the_ranker_reads_fields_in_order_with_multi_values_averaged() -> None:
    seen: list[Inputs] = []

    class Spy(torch.nn.Module):
        def __init__(self, inputs: InputSpec) -> None:
            super().__init__()
            self.inputs = inputs

        def forward(self, inputs: Inputs) -> dict[str, torch.Tensor]:
            seen.append(inputs)
            return {"click": inputs.concat().sum(1)}

    model = build()
    spec = model.ranker.inputs
    assert spec.fields == {"user": 8, "item": 8, "tags": 8, "interest": 8}
    assert spec.from_request == {"user"}
    assert spec.dense == 1
    model.ranker = Spy(spec)
    batch = serving_batch(3)
    model(batch)
    (inputs,) = seen
    assert list(inputs.fields) == list(spec.fields)
    assert torch.equal(inputs.dense, torch.full((3, 1), 0.5)), "the user's age, repeated"
    vectors = model.embed(batch)
    assert torch.equal(inputs.fields["user"], vectors["user"].values().expand(3, -1))
    assert torch.equal(inputs.fields["tags"], vectors["tags"].values()), "the mean of one value is the value"


def test_the_mean_of_several_values_and_of_none() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    pooled = mean_pool(JaggedTensor(values=values, lengths=torch.tensor([2, 0, 1])))
    assert pooled.tolist() == [[2.0, 3.0], [0.0, 0.0], [5.0, 6.0]]
    pooled.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]


def test_explanations_weigh_each_history_item_for_each_target() -> None:
    weights = build().eval().explain(serving_batch(4, history=3))
    assert set(weights) == {"history"}
    assert weights["history"].values().shape == (12, 1)
    assert weights["history"].lengths().tolist() == [3, 3, 3, 3]
    assert build(interest=None).explain(serving_batch(4)) == {}


def test_aligned_sequences_are_attended_together() -> None:
    """Items and their tags: the interest reads 8 + 8 columns, the target's in the same order."""
    features = [
        {"name": "item"},
        {"name": "brand", "dim": 4},
        {"name": "items_seen", "kind": "sequence", "of": "item"},
        {"name": "brands_seen", "kind": "sequence", "of": "brand"},
    ]
    config = small_config(features=features, embedding={"name": "hashing", "dim": 8, "options": {"rows": 99}})
    model = build_model(config, {}, installed())
    assert model.interest is not None
    assert model.interest.dim == 12
    batch = serving_batch(2)
    lengths = np.array([3])

    def ids(brands: int) -> Any:
        return keyed_jagged(
            {
                "item": (fingerprints([1, 2]), None),
                "brand": (fingerprints([1, 2]), None),
                "items_seen": (fingerprints([1, 2, 3]), lengths),
                "brands_seen": (fingerprints(range(brands)), np.array([brands])),
            }
        )

    batch.ids, batch.dense_user = ids(3), torch.zeros(1, 0)
    assert model(batch)["click"].shape == (2,)
    batch.ids = ids(2)
    with pytest.raises(SchemaError, match="items_seen, brands_seen differ in length"):
        model(batch)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"name": "item", "kind": "multi"}, "which is multi on the item's side"),
        ({"name": "item", "side": "user"}, "which is categorical on the user's side"),
        ({"name": "thing"}, "must name an item feature, not 'item'"),
    ],
)
def test_a_sequence_of_what_cannot_be_attended_is_refused(target: dict[str, Any], message: str) -> None:
    config = small_config(features=[target, {"name": "history", "kind": "sequence", "of": "item"}])
    with pytest.raises(SchemaError, match=message):
        build_model(config, STATISTICS, installed())


def test_the_first_weights_follow_from_the_seed() -> None:
    first, same, other = build(seed=4), build(seed=4), build(seed=5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(next(first.ranker.parameters()), next(other.ranker.parameters()))


def test_a_frozen_model_built_without_memory_takes_a_stored_one() -> None:
    stored = build().freeze().state_dict()
    empty = build_model(small_config(), STATISTICS, installed(), frozen=True, device="meta")
    empty.load_state_dict(stored, assign=True)
    batch = serving_batch(5)
    assert torch.equal(empty(batch)["click"], build().freeze()(batch)["click"])
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))


def test_missing_statistics_are_named() -> None:
    with pytest.raises(SchemaError, match="embedding 'full' needs statistics of item, tags, user"):
        build_model(small_config(), {}, installed())
