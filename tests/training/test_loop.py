"""The loop: it learns, stops early, restores the best epoch, and names the step where the loss breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from engine.components import Loss
from engine.config import OptimizerConfig
from engine.errors import ConfigError, SchemaError
from engine.hookspecs import hookimpl
from engine.plugins import Plugins, installed
from engine.training.loop import train
from engine.training.optim import schedule
from engine.training.step import TrainingError
from tests.training.small import SmallPrepared, small_config


def test_a_planted_taste_is_learned_and_the_figures_are_those_of_the_predictions(tmp_path: Path) -> None:
    result = train(small_config(training={"epochs": 8}), SmallPrepared(), tmp_path, plugins=installed())
    losses = [epoch["loss"] for epoch in result.metrics["history"]]
    assert losses[-1] < losses[0] - 0.05
    assert result.test is not None
    labels, logits = result.test.labels["click"], result.test.logits["click"]
    assert result.metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert result.metrics["logloss"] == pytest.approx(
        log_loss(labels, 1 / (1 + np.exp(-logits.astype(float)))), abs=1e-6
    )
    assert len(result.test) == 150
    assert result.metrics["epochs"] == 8
    assert result.metrics["rows_per_second"] > 0
    assert result.metrics["embedding_bytes"] == 4 * 8 * (41 + 61 + 7), "a row an id and one for the unknown, width 8"


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    runs = [
        train(small_config(seed=seed, training={"epochs": 1}), SmallPrepared(), tmp_path / str(n), plugins=installed())
        for n, seed in enumerate((5, 5, 6))
    ]
    first, second, other = (run.test.logits["click"] for run in runs if run.test is not None)
    assert np.array_equal(first, second)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("metric", ["auc", "gauc", "logloss"])
def test_the_best_epoch_by_the_named_metric_is_what_is_left(tmp_path: Path, metric: str) -> None:
    stopping = {"metric": metric, "patience": 2}
    config = small_config(
        training={"epochs": 12, "early_stopping": stopping, "optimizer": {"embedding_lr": 0.3, "dense_lr": 0.03}}
    )
    result = train(config, SmallPrepared(), tmp_path, plugins=installed())
    history = [epoch[metric] for epoch in result.metrics["history"]]
    best = int(np.argmin(history) if metric == "logloss" else np.argmax(history))
    assert result.metrics["best_epoch"] == best + 1
    assert result.metrics["epochs"] == min(12, best + 3), "two epochs without improvement end the run"
    from engine.training.evaluation import figures

    assert result.validation is not None
    assert figures(result.validation, "click")[metric] == pytest.approx(history[best], abs=1e-6)


def test_gauc_without_users_cannot_stop_a_run(tmp_path: Path) -> None:
    data = {"source": {"interactions": "none"}, "labels": {"click": {"column": "click"}}, "user": None}
    config = small_config(data=data, training={"early_stopping": {"metric": "gauc"}})
    with pytest.raises(ConfigError, match="gauc needs users"):
        train(config, SmallPrepared(), tmp_path, plugins=installed())


def test_two_tasks_are_learned_and_reported(tmp_path: Path) -> None:
    labels = {"click": {"column": "click"}, "buy": {"column": "click"}}
    config = small_config(data={"source": {"interactions": "none"}, "labels": labels}, training={"epochs": 1})
    result = train(config, SmallPrepared(tasks=("click", "buy")), tmp_path, plugins=installed())
    assert set(result.metrics["tasks"]) == {"click", "buy"}
    assert result.test is not None
    assert set(result.test.logits) == {"click", "buy"}


class _Exploding(Loss):
    """A loss that is no number at the third step."""

    name = "exploding"
    steps = 0

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, weight: Any = None, **context: Any) -> torch.Tensor:
        type(self).steps += 1
        return logits.mean() * (float("nan") if type(self).steps == 3 else 1.0)


@hookimpl
def losses() -> list[type[Loss]]:
    return [_Exploding]


class _WithExplodingLoss(Plugins):
    def get(self, kind: str, name: str) -> type[Any]:
        return _Exploding if (kind, name) == ("losses", "exploding") else super().get(kind, name)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    config = small_config(training={"loss": {"name": "exploding"}})
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3 \(epoch 1\).*embedding_lr"):
        train(config, SmallPrepared(), tmp_path, plugins=_WithExplodingLoss())


def test_hooks_hear_each_step_and_each_checkpoint(tmp_path: Path) -> None:
    heard: dict[str, list[int]] = {"step": [], "checkpoint": []}

    class Listener:
        @hookimpl
        def on_train_step(self, step: int, metrics: dict[str, float]) -> None:
            assert np.isfinite(metrics["loss"])
            heard["step"].append(step)

        @hookimpl
        def on_checkpoint(self, path: Path, step: int) -> None:
            assert (path / "index.json").exists()
            heard["checkpoint"].append(step)

    plugins = Plugins(budget_seconds=5)
    plugins.manager.register(Listener())
    shown: list[float] = []
    train(
        small_config(),
        SmallPrepared(),
        tmp_path,
        plugins=plugins,
        progress=lambda stage, share: shown.append(share),
    )
    assert heard == {"step": list(range(1, 17)), "checkpoint": [8, 16]}
    assert shown
    assert all(0 <= share <= 1 for share in shown)


@pytest.mark.parametrize(
    ("kind", "step", "factor"),
    [
        ("constant", 0, 0.25),
        ("constant", 50, 1.0),
        ("linear", 4, 1.0),
        ("linear", 52, 0.5),
        ("linear", 100, 0.0),
        ("cosine", 52, 0.5),
        ("cosine", 28, 0.8535534),
        ("cosine", 100, 0.0),
    ],
)
def test_learning_rates_rise_over_four_steps_and_then_take_their_course(kind: str, step: int, factor: float) -> None:
    """100 steps: after the rise, 96 remain; step 52 is half of them, step 28 a quarter: (1 + cos 45 deg) / 2."""
    config = OptimizerConfig(schedule=kind, warmup_steps=4)  # type: ignore[arg-type]
    assert schedule(config, step, 100) == pytest.approx(factor, abs=1e-6)


def test_without_statistics_regularisation_is_refused(tmp_path: Path) -> None:
    prepared = SmallPrepared()
    prepared.statistics = {}
    config = small_config(embedding={"name": "hashing", "dim": 8}, training={"mini_batch_aware_l2": 0.1})
    with pytest.raises(SchemaError, match="needs the counts of item, tags, user"):
        train(config, prepared, tmp_path, plugins=installed())
