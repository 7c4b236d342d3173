"""Which row trains, validates and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import DataError, SchemaError

World = Callable[..., Any]
FEATURES = [{"name": "user", "side": "user"}, {"name": "item"}]


def rows(prepared: Any) -> dict[str, list[int]]:
    return {split: prepared.arrays[f"split.{split}"].tolist() for split in ("train", "validation", "test")}


def log(count: int) -> dict[str, list[Any]]:
    return {
        "user": [f"u{n % 3}" for n in range(count)],
        "item": [n % 7 for n in range(count)],
        "time": [count - n for n in range(count)],
        "label": [n % 2 for n in range(count)],
    }


def test_by_time_the_oldest_train_and_the_newest_test(world: World) -> None:
    """Ten rows, newest first in the file: 8 train, 1 validates, 1 tests."""
    prepared = world(log(10), FEATURES, split={"by": "time", "validation": 0.1, "test": 0.1})
    assert rows(prepared) == {"train": [9, 8, 7, 6, 5, 4, 3, 2], "validation": [1], "test": [0]}
    assert prepared.rows == {"train": 8, "validation": 1, "test": 1}
    assert prepared.label_rates == {"train": 0.5, "validation": 1.0, "test": 0.0}


def test_equal_times_stand_by_user_then_item_numbers_as_numbers(world: World) -> None:
    equal = {"user": ["9", "10", "10"], "item": [1, 10, 9], "time": [5, 5, 5], "label": [0, 1, 1]}
    assert rows(world(equal, FEATURES))["train"] == [0, 2, 1]


def test_texts_stand_by_their_letters(world: World) -> None:
    equal = {"user": ["b", "B", "10", "9"], "item": [1, 1, 1, 1], "time": [5] * 4, "label": [0, 1, 1, 0]}
    assert rows(world(equal, FEATURES))["train"] == [2, 3, 1, 0]


def test_by_user_the_last_part_of_each(world: World) -> None:
    """Users u0: rows 9 6 3 0 by time, u1: 7 4 1, u2: 8 5 2. Tests from place ceil(m (1 - test)) on."""
    prepared = world(log(10), FEATURES, split={"by": "user_tail", "validation": 0, "test": 0.25})
    assert rows(prepared) == {"train": [9, 8, 7, 6, 5, 4, 3, 2, 1], "validation": [], "test": [0]}
    prepared = world(log(10), FEATURES, split={"by": "user_tail", "validation": 0.25, "test": 0.34})
    assert rows(prepared) == {"train": [9, 8, 7, 6, 5, 4], "validation": [3], "test": [2, 1, 0]}


def test_by_hash_a_keys_rows_stay_together_and_the_shares_hold(world: World) -> None:
    many = {
        "user": [n // 2 for n in range(8000)],
        "item": [0] * 8000,
        "time": list(range(8000)),
        "label": [0, 1] * 4000,
    }
    parts = rows(world(many, FEATURES, split={"by": "hash", "validation": 0.1, "test": 0.2}))
    owners = {split: {row // 2 for row in part} for split, part in parts.items()}
    assert not owners["train"] & owners["test"]
    assert not owners["train"] & owners["validation"]
    # 4,000 keys: standard deviations of .0063 and .0047
    assert len(owners["test"]) / 4000 == pytest.approx(0.2, abs=0.02)
    assert len(owners["validation"]) / 4000 == pytest.approx(0.1, abs=0.015)
    again = {**many, "user": many["user"][::-1], "label": many["label"][::-1]}
    flipped = rows(world(again, FEATURES, split={"by": "hash", "validation": 0.1, "test": 0.2}))
    assert {many["user"][::-1][row] for row in flipped["test"]} == owners["test"]


def test_by_column_the_names_decide(world: World) -> None:
    named = log(4) | {"part": ["test", "train", "valid", "Train "]}
    prepared = world(named, FEATURES, split={"by": "column", "column": "part"})
    assert rows(prepared) == {"train": [3, 1], "validation": [2], "test": [0]}
    with pytest.raises(DataError, match="holds 'dev'; it may hold train, validation and test"):
        world(log(2) | {"part": ["dev", "train"]}, FEATURES, split={"by": "column", "column": "part"})


def test_positives_of_a_split_keep_its_order(world: World) -> None:
    prepared = world(log(10), FEATURES, split={"by": "time", "validation": 0.1, "test": 0.1})
    assert prepared.arrays["positive.train"].tolist() == [9, 7, 5, 3]
    assert prepared.steps("train", 3, positives_only=True) == 2


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"by": "column"}, "data.split.column names none"),
        ({"by": "column", "column": "parts"}, "no column 'parts'"),
        ({"by": "hash", "key": "usr"}, "no column 'usr'; did you mean 'user'"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(world: World, split: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        world(log(4), FEATURES, split=split)


def test_a_split_without_training_rows_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="leaves no training rows"):
        world(log(2) | {"part": ["test", "test"]}, FEATURES, split={"by": "column", "column": "part"})
