"""`plexrank learn`: which partitions, and what is wrong usage."""

from __future__ import annotations

import pytest
import typer

from engine.commands.learning import chosen, learn

THERE = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("partitions", "share", "expected"),
    [(None, None, None), ("0,2", None, [0, 2]), (None, "0/2", [0, 2, 4]), (None, "1/2", [1, 3]), (None, "0/1", THERE)],
)
def test_partitions_are_named_or_shared_out(
    partitions: str | None, share: str | None, expected: list[int] | None
) -> None:
    assert chosen(partitions, share, THERE) == expected


def test_the_shares_of_several_learners_are_all_partitions_each_once() -> None:
    shares = [chosen(None, f"{k}/3", THERE) for k in range(3)]
    assert sorted(p for share in shares if share is not None for p in share) == THERE


@pytest.mark.parametrize(
    ("partitions", "share", "says"),
    [("a", None, "no list of partitions"), (None, "2/2", "K < N"), (None, "x", "K < N"), ("0", "0/1", "not both")],
)
def test_what_is_neither_is_wrong_usage(partitions: str | None, share: str | None, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        chosen(partitions, share, THERE)


def test_without_a_model_it_is_wrong_usage(tmp_path) -> None:
    with pytest.raises(typer.BadParameter, match="--bundle or --models"):
        learn(tmp_path / "none.yaml")
