"""Putting fields side by side."""

from __future__ import annotations

import torch

from engine.components import Inputs, InputSpec
from engine.components.networks import runs
from models.deepfm import pair_products
from models.dlrm import DLRMRanker
from models.layers import EqualWidths


def test_neighbouring_columns_of_one_tensor_are_joined_without_a_copy() -> None:
    table = torch.randn(2, 6)
    a, b, c = table.split([1, 2, 3], dim=1)
    (whole,) = runs([a, b, c])
    assert whole is table
    (joined,) = runs([b, c])
    assert joined.data_ptr() == b.data_ptr()
    assert torch.equal(joined, table[:, 1:])


def test_columns_out_of_order_or_of_different_tensors_stay_apart() -> None:
    a, b, c = torch.randn(2, 6).split([1, 2, 3], dim=1)
    other = torch.randn(2, 4)
    parts = [b, a, c, other, other[:, :1], torch.randn(2, 3).T[:, :1].T.expand(2, 3)]
    torch.testing.assert_close(torch.cat(runs(parts), dim=1), torch.cat(parts, dim=1))
    assert len(runs([b, a])) == 2
    assert len(runs([a, c])) == 2
    assert len(runs([a, a])) == 2


def test_rows_of_a_tensor_are_not_taken_for_its_columns() -> None:
    table = torch.randn(4, 3)
    parts = [table[:2], table[2:]]
    assert all(given is found for given, found in zip(parts, runs(parts), strict=True))


def test_fields_taken_where_gradients_are_off_pass_none_on() -> None:
    table = torch.randn(2, 4, requires_grad=True) * 2
    table.retain_grad()
    with torch.no_grad():
        a, b = table.split(2, dim=1)
    Inputs({"a": a, "b": b}, dense=torch.empty(2, 0)).concat().sum().backward()
    assert table.grad is None


def test_gradients_reach_the_tensor_that_the_fields_are_columns_of() -> None:
    table = torch.randn(3, 6, requires_grad=True)
    fields = dict(zip("abc", table.split(2, dim=1), strict=True))
    weight = torch.randn(7)
    Inputs(fields, dense=torch.ones(3, 1)).concat().mul(weight).sum().backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad, weight[:6].expand(3, 6))


def test_fields_of_several_widths_are_each_projected_by_their_own_weights() -> None:
    torch.manual_seed(0)
    spec = InputSpec(fields={"a": 3, "b": 2, "c": 3}, dense=2)
    vectors = EqualWidths(spec, 4)
    fields = {name: torch.randn(5, width) for name, width in spec.fields.items()}
    made = vectors(Inputs(fields, dense=torch.randn(5, 2)))
    wide, narrow = vectors.weights
    expected = [fields["a"] @ wide[0], fields["c"] @ wide[1], fields["b"] @ narrow[0]]
    torch.testing.assert_close(made[:, :3], torch.stack(expected, dim=1))
    assert made.shape == (5, 4, 4)


def test_the_derivative_of_the_pair_products_is_that_of_their_definition() -> None:
    vectors = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pair_products, (vectors,))


def test_the_derivative_of_dlrms_products_is_that_of_their_definition() -> None:
    model = DLRMRanker(InputSpec(fields={"a": 2, "b": 2, "c": 2, "d": 2}), ["click"], DLRMRanker.Options())
    vectors = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.products, (vectors,))
