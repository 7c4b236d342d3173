"""The interaction terms of the rankers against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from engine.components import Inputs, InputSpec
from models.dcnv2 import Cross, DCNv2Ranker
from models.deepfm import DeepFMRanker, pair_products
from models.dlrm import DLRMRanker
from models.layers import EqualWidths
from models.mmoe import MMoERanker

SPEC = InputSpec(fields={"a": 3, "b": 5}, dense=2)


def inputs(rows: int = 4) -> Inputs:
    random = torch.Generator().manual_seed(0)
    fields = {name: torch.randn(rows, width, generator=random) for name, width in SPEC.fields.items()}
    return Inputs(fields=fields, dense=torch.randn(rows, SPEC.dense, generator=random))


def test_the_fm_term_is_the_sum_over_all_pairs_of_fields() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 5, 3))
    expected = sum(vectors[:, i] * vectors[:, j] for i, j in itertools.combinations(range(5), 2))
    np.testing.assert_allclose(pair_products(torch.tensor(vectors)), expected, atol=1e-12)


def test_deepfm_starts_as_first_order_plus_inner_products_plus_the_deep_part() -> None:
    torch.manual_seed(0)
    model = DeepFMRanker(SPEC, ["click"], DeepFMRanker.Options(hidden=(8,), fm_dim=4))
    given = inputs()
    v = model.vectors(given).detach().numpy()
    inner = sum((v[:, i] * v[:, j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    x = given.concat()
    rest = (model.first_order(x) + model.deep(model.body(x)))[:, 0].detach().numpy()
    np.testing.assert_allclose(model(given)["click"].detach(), rest + inner, rtol=1e-5, atol=1e-5)


def test_dlrm_multiplies_every_pair_of_fields_once() -> None:
    model = DLRMRanker(SPEC, ["click"], DLRMRanker.Options())
    vectors = torch.randn(4, 3, 16)
    v = vectors.numpy()
    expected = np.stack([(v[:, i] * v[:, j]).sum(1) for i, j in [(0, 1), (0, 2), (1, 2)]], axis=1)
    np.testing.assert_allclose(model.products(vectors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_cross_is_x0_times_a_linear_map_plus_x(rank: int) -> None:
    torch.manual_seed(0)
    cross = Cross(6, rank)
    start, x = torch.randn(3, 6), torch.randn(3, 6)
    w = cross.linear.weight.detach().numpy()
    w = w @ cross.narrow.weight.detach().numpy() if rank else w
    expected = start.numpy() * (x.numpy() @ w.T + cross.linear.bias.detach().numpy()) + x.numpy()
    np.testing.assert_allclose(cross(start, x).detach(), expected, rtol=1e-5, atol=1e-6)


def test_two_crosses_make_products_of_three_columns() -> None:
    """With W = 1 and b = 0 on one column: x1 = x0 x0 + x0, x2 = x0 x1 + x1 = x0^3 + 2 x0^2 + x0."""
    crosses = [Cross(1, 0), Cross(1, 0)]
    for cross in crosses:
        torch.nn.init.ones_(cross.linear.weight)
        torch.nn.init.zeros_(cross.linear.bias)
    x0 = torch.tensor([[2.0]])
    x = x0
    for cross in crosses:
        x = cross(x0, x)
    assert x.item() == 8 + 2 * 4 + 2


@pytest.mark.parametrize(("structure", "width"), [("stacked", 8), ("parallel", 18)])
def test_dcnv2_sets_the_deep_part_behind_the_crosses_or_beside_them(structure: str, width: int) -> None:
    model = DCNv2Ranker(SPEC, ["click"], DCNv2Ranker.Options(hidden=(8,), structure=structure))
    assert model.heads.in_features == width


def test_mmoe_mixes_the_experts_by_the_gate_of_each_task() -> None:
    torch.manual_seed(0)
    model = MMoERanker(SPEC, ["click", "buy"], MMoERanker.Options(hidden=(8,), experts=3, tower=()))
    given = inputs()
    x = given.concat()
    experts = [expert(x) for expert in model.experts]
    got = model(given)
    for task, gate, tower in zip(["click", "buy"], model.gates, model.towers, strict=True):
        logits = gate(x).detach().numpy()
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        mixed = sum(torch.tensor(share[:, [e]]) * experts[e] for e in range(3))
        torch.testing.assert_close(got[task], tower(mixed)[:, 0], rtol=1e-4, atol=1e-5)


def test_a_task_learns_through_its_own_gate_and_tower_only() -> None:
    model = MMoERanker(SPEC, ["click", "buy"], MMoERanker.Options(hidden=(8,), experts=3))
    model(inputs())["buy"].sum().backward()
    assert model.gates[0].weight.grad is None
    assert model.gates[1].weight.grad.any()
    assert all(p.grad.any() for expert in model.experts for p in [next(expert.parameters())])


def test_features_that_share_a_row_are_told_apart_by_their_projections() -> None:
    """Two features of a multiplexed table read the same row: an inner product of the raw vectors could not tell which
    one it was, the projected ones can."""
    torch.manual_seed(0)
    vectors = EqualWidths(InputSpec(fields={"a": 3, "b": 3}), 4)
    row = torch.randn(1, 3)
    made = vectors(Inputs(fields={"a": row, "b": row}, dense=torch.empty(1, 0)))
    assert not torch.allclose(made[:, 0], made[:, 1], atol=1e-2)
