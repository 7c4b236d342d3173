"""Rows of one id are trained from its n-th example on, and forgotten when nothing came for long."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.config_learning import LearningConfig
from engine.hashing import fingerprint
from engine.model import build_model
from engine.plugins import Plugins
from engine.streaming.learning.rows import RowLifetime
from engine.training.online import OnlineTrainer

USER = "t_user_id"


def begun(bundle: Path, plugins: Plugins, **learning: Any) -> tuple[OnlineTrainer, RowLifetime]:
    opened, config = Bundle.open(bundle, verify=False), LearningConfig(**learning)
    trainer = OnlineTrainer(opened, config, plugins)
    return trainer, RowLifetime(opened, config, trainer)


def row_of(bundle: Path, user: str) -> int:
    """Behind the unknown row, in the order of the fingerprints."""
    prints = Bundle.open(bundle, verify=False).statistics["user_id"].fingerprints
    return 1 + int(np.searchsorted(prints, fingerprint(user)))


def of_user(data: Any, user: str) -> Any:
    """One example of a user."""
    for batch in data.batches("train", 1):
        if int(batch.user_key) == fingerprint(user):
            return batch
    raise AssertionError(user)


def test_an_id_trains_the_unknown_row_before_its_nth_example(
    tiny_bundle: Path, film_data: Any, plugins: Plugins
) -> None:
    """User u3's count of the training split is k: with admission k + 3 two more examples are trained in row 0."""
    statistics = Bundle.open(tiny_bundle).statistics["user_id"]
    count = int(statistics.counts[np.searchsorted(statistics.fingerprints, fingerprint("u3"))])
    trainer, rows = begun(tiny_bundle, plugins, admission=count + 3)
    batch, row = of_user(film_data, "u3"), row_of(tiny_bundle, "u3")
    labels = np.ones((1, 1), np.float32)
    for example in range(4):
        before = trainer.rows(USER, np.array([0, row]))
        trainer.step(rows.admit(batch, 1000.0 + example), labels)
        moved = (trainer.rows(USER, np.array([0, row])) != before).any(axis=1)
        assert moved.tolist() == ([True, False] if example < 2 else [False, True]), example


def test_rows_of_which_nothing_came_are_put_back_and_go_out(
    tiny_bundle: Path, film_data: Any, plugins: Plugins
) -> None:
    """Two batches a hundred seconds apart, expiry after sixty: the rows of the first that are not in the second are
    what an untrained model has."""
    trainer, rows = begun(tiny_bundle, plugins, expiry_seconds=60)
    one, two = of_user(film_data, "u3"), of_user(film_data, "u5")
    first = build_model(Bundle.open(tiny_bundle).config, Bundle.open(tiny_bundle).statistics, plugins, frozen=True)
    fresh = first.state_dict()[f"embedding.weights.{USER}"].numpy()
    labels = np.ones((1, 1), np.float32)
    trainer.step(rows.admit(one, 1000.0), labels)
    trainer.take_delta()
    trainer.step(rows.admit(two, 1100.0), labels)
    gone, here = row_of(tiny_bundle, "u3"), row_of(tiny_bundle, "u5")
    np.testing.assert_array_equal(trainer.rows(USER, np.array([gone]))[0], fresh[gone])
    assert not np.array_equal(trainer.rows(USER, np.array([here]))[0], fresh[here])
    tables, _ = trainer.take_delta()
    assert {gone, here} <= set(tables[USER].rows.tolist())
    assert float(trainer.optimizer_state()[f"tables/{USER}"][gone]) == 0.0
    expired = rows.expired
    rows.admit(two, 1107.0)
    assert rows.expired == expired, "what is forgotten is not forgotten again"


def test_the_state_goes_on(tiny_bundle: Path, film_data: Any, plugins: Plugins) -> None:
    whole = begun(tiny_bundle, plugins, admission=60, expiry_seconds=30)
    again = begun(tiny_bundle, plugins, admission=60, expiry_seconds=30)
    batches = list(islice(film_data.batches("train", 16), 6))
    for n, batch in enumerate(batches[:3]):
        whole[1].admit(batch, 1000.0 + 20 * n)
    again[1].load({name: value.copy() for name, value in whole[1].state().items()})
    for n, batch in enumerate(batches[3:]):
        one, two = (its[1].admit(batch, 1060.0 + 20 * n) for its in (whole, again))
        assert torch.equal(one.ids.values(), two.ids.values())
    assert whole[1].expired == again[1].expired


@pytest.mark.parametrize("learning", [{}, {"admission": 5, "expiry_seconds": 10}])
def test_tables_that_ids_share_are_left_alone(
    films: Any, film_data: Any, plugins: Plugins, tmp_path: Path, learning: dict[str, Any]
) -> None:
    from engine.train_command import run_training

    config = films.config(embedding={"name": "hashing", "dim": 8, "options": {"rows": 50}})
    run_training(config, tmp_path, plugins=plugins)
    _, rows = begun(tmp_path / "bundle", plugins, **learning)
    batch = next(iter(film_data.batches("train", 8)))
    assert rows.admit(batch, 1000.0) is batch
    assert rows.expired == 0
