"""What a model takes and gives as tensors, and what is said of tensors that are something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import RequestError, SchemaError
from engine.inference.signature import Signature
from engine.inference.tensors import checked
from engine.schema import FeatureSpec, Schema
from tests.inference.rich_world import config_of

SIGNATURE = Signature.of(config_of(Path()).schema_())
GOOD: dict[str, np.ndarray] = {
    "candidates": np.arange(3),
    "user_id": np.array([7]),
    "age": np.array([0.5], np.float32),
    "likes": np.arange(2),
    "history": np.arange(4),
    "tags": np.arange(3),
    "tags.lengths": np.array([2, 0, 1], np.int32),
    "price": np.zeros(3, np.float32),
}


def test_each_feature_is_a_tensor_of_its_kind() -> None:
    assert [(s.name, s.datatype, s.rows, s.optional) for s in SIGNATURE.inputs] == [
        ("candidates", "INT64", "candidates", False),
        ("user_id", "INT64", "one", True),
        ("age", "FP32", "one", True),
        ("likes", "INT64", "any", True),
        ("hour", "INT64", "one", True),
        ("load", "FP32", "one", True),
        ("brand", "INT64", "candidates", True),  # item_id is no input: the candidates are
        ("tags", "INT64", "any", True),
        ("tags.lengths", "INT32", "candidates", True),
        ("price", "FP32", "candidates", True),
        ("weight", "FP32", "candidates", True),
        ("year", "INT64", "candidates", True),
        ("history", "INT64", "any", True),
        ("brands", "INT64", "any", True),
    ]
    assert [(s.name, s.datatype) for s in SIGNATURE.outputs] == [
        ("click", "FP32"),
        ("buy", "FP32"),
        ("version", "UINT8"),
    ]


@pytest.mark.parametrize(
    ("features", "tasks", "message"),
    [
        ([{"name": "candidates"}], ("click",), "feature 'candidates' has the name of another tensor"),
        ([{"name": "tags", "kind": "multi"}, {"name": "tags.lengths"}], ("click",), "feature 'tags.lengths' has the"),
        ([{"name": "brand"}], ("click", "version"), "task 'version' has the name of another tensor"),
    ],
)
def test_a_name_that_another_tensor_has_is_refused(
    features: list[dict[str, Any]], tasks: tuple[str, ...], message: str
) -> None:
    schema = Schema(features=tuple(FeatureSpec(**f) for f in features), tasks=tasks)
    with pytest.raises(SchemaError, match=message):
        Signature.of(schema)


def test_what_fits_comes_back_as_it_is() -> None:
    found = checked(GOOD, SIGNATURE)
    assert found.keys() == GOOD.keys()
    assert all(np.array_equal(found[name], values) for name, values in GOOD.items())


def test_histories_are_cut_and_far_numbers_brought_near() -> None:
    long = {"history": np.arange(40), "likes": np.arange(9), "price": np.array([1e30, -1e30, 2], np.float32)}
    found = checked(GOOD | long, SIGNATURE)
    assert found["history"].tolist() == [*range(12)]
    assert found["likes"].tolist() == [0, 1, 2, 3]
    assert found["price"].tolist() == [1e4, -1e4, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": None}, "tensor 'candidates' is missing"),
        ({"candidates": np.arange(3, dtype=np.int32)}, "tensor 'candidates': is int32, int64 wanted"),
        ({"candidates": np.arange(3, dtype=">i8")}, "tensor 'candidates': is >i8, int64 wanted"),
        ({"candidates": np.array(["a"], object)}, "tensor 'candidates': is object, int64 wanted"),
        ({"candidates": np.zeros((1, 3), np.int64)}, r"tensor 'candidates': has shape \[1, 3\], one dimension"),
        ({"candidates": np.arange(20_001)}, "tensor 'candidates': 20001 items in one request, at most 20000"),
        ({"age": torch.zeros(1, dtype=torch.bfloat16)}, "tensor 'age': is bfloat16, float32 wanted"),
        ({"age": np.zeros(2, np.float32)}, "tensor 'age': has 2 values, 1 wanted"),
        ({"age": np.array([np.nan], np.float32)}, "tensor 'age': holds a number that is not finite; leave"),
        ({"user_id": np.empty(0, np.int64)}, "tensor 'user_id': has 0 values, 1 wanted"),
        ({"price": np.zeros(4, np.float32)}, "tensor 'price': has 4 values, 3 wanted for 3 candidates"),
        ({"price": np.full(3, np.inf, np.float32)}, "tensor 'price': holds a number that is not finite"),
        ({"tags.lengths": None}, "tensor 'tags': needs 'tags.lengths'"),
        ({"tags": None}, "tensor 'tags': has 0 values, but 'tags.lengths' sums to 3"),
        ({"tags": np.arange(4)}, "tensor 'tags': has 4 values, but 'tags.lengths' sums to 3"),
        ({"tags.lengths": np.array([4, -1, 0], np.int32)}, "tensor 'tags.lengths': must lie between 0 and 3"),
        ({"tags.lengths": np.array([3, 0], np.int32)}, "tensor 'tags.lengths': has 2 values, 3 wanted"),
        ({"pricee": np.zeros(3, np.float32)}, "tensor 'pricee': the model has no such input; did you mean 'price'?"),
        ({"item_id": np.arange(3)}, "tensor 'item_id': the model has no such input"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    tensors = {name: values for name, values in (GOOD | changes).items() if values is not None}
    with pytest.raises(RequestError, match=message):
        checked(tensors, SIGNATURE)
