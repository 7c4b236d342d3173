"""The guard on a logistic model that learns in numpy: what is published is never much worse than the base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config_learning import GuardConfig
from engine.streaming.join.emitted import NEGATIVE, POSITIVE
from engine.streaming.learning.guard import Guard, Verdict
from engine.streaming.learning.progress import ProgressiveValidation, losses

DIM, BATCH = 10, 100
TRUE = np.random.default_rng(0).normal(0, 0.7, DIM)


def rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, DIM))
    return x, (random.random(n) < 1 / (1 + np.exp(-x @ TRUE))).astype(np.float32)


def predicted(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x @ weights))


FRESH = rows(50_000, 999)


def true_loss(weights: np.ndarray) -> float:
    x, y = FRESH
    return float(losses(y, predicted(weights, x)).mean())


class Learner:
    """Scores, observes, judges, publishes what was judged, then trains; goes back when it is told to."""

    def __init__(self, rate: float, **config: Any) -> None:
        self.base = TRUE * 0.9
        self.weights, self.rate = self.base.copy(), rate
        self.guard = Guard(GuardConfig(window=2000, minimum=500, **config), begun_with="v0", on_stop=self.stop)
        self.progress = ProgressiveValidation(["click"], 2000)
        self.kept = {"v0": self.base.copy()}
        self.published: list[np.ndarray] = []
        self.stops: list[tuple[Verdict, str]] = []

    def stop(self, verdict: Verdict, good: str) -> None:
        self.stops.append((verdict, good))
        self.weights = self.kept[good].copy()
        self.progress.clear()

    def step(self, seed: int) -> Verdict:
        x, y = rows(BATCH, seed)
        p, b = (predicted(w, x).astype(np.float32)[:, None] for w in (self.weights, self.base))
        kind = np.where(y > 0.5, POSITIVE, NEGATIVE).astype(np.int8)
        self.progress.observe(y[:, None], p, b, np.ones(BATCH, np.float32), np.full(BATCH, seed, float), kind)
        verdict = self.guard.judge(self.progress.figures())
        if verdict.ok:
            self.published.append(self.weights.copy())
        self.weights = self.weights - self.rate * x.T @ (predicted(self.weights, x) - y) / BATCH
        return verdict


@pytest.mark.parametrize("rate", [50.0, 200.0, 1e4])
def test_an_absurd_learning_rate_is_stopped_before_the_served_model_is_past_the_limit(rate: float) -> None:
    learner = Learner(rate)
    for seed in range(100):
        learner.step(seed)
    assert learner.stops
    verdict, good = learner.stops[0]
    assert good == "v0"
    assert "log loss of task 'click'" in verdict.reasons[0]
    assert "learning.guard.logloss_ratio" in verdict.reasons[0]
    limit = 1.05 * true_loss(learner.base)
    assert max(true_loss(w) for w in learner.published) <= limit
    unguarded = Learner(rate, logloss_ratio=None, auc_drop=None, calibration=None)
    for seed in range(100):
        unguarded.step(seed)
    assert max(true_loss(w) for w in unguarded.published) > limit


def test_a_rate_at_which_a_few_rows_cannot_tell_is_stopped_after_three_batches() -> None:
    """Its first step doubles the log loss; 100 rows leave room for chance, 200 do not."""
    learner = Learner(20.0)
    assert [learner.step(seed).ok for seed in range(3)] == [True, True, False]


def test_a_rate_that_is_only_too_high_is_stopped_within_the_window() -> None:
    """It makes a model whose log loss is some 1.2 times the base's: a few hundred examples tell."""
    learner = Learner(8.0)
    verdicts = [learner.step(seed) for seed in range(20)]
    assert learner.stops
    assert verdicts[-1].examples == 2000


def test_a_sane_learning_rate_is_never_stopped() -> None:
    learner = Learner(0.05)
    assert all(learner.step(seed).ok for seed in range(400))
    assert not learner.stops


def test_a_diverged_model_is_stopped_at_once() -> None:
    learner = Learner(0.0)
    learner.step(0)
    learner.weights[:] = np.nan
    verdict = learner.step(1)
    assert verdict.reasons == ("100 scores of task 'click' are no finite numbers: the model has diverged",)


def test_without_rollback_it_stops_and_leaves_the_model_as_it_is() -> None:
    learner = Learner(50.0, rollback=False)
    verdicts = [learner.step(seed) for seed in range(50)]
    assert not learner.stops
    assert not verdicts[-1].ok


def test_publishing_goes_on_after_the_minimum_of_good_examples() -> None:
    learner = Learner(0.0)
    good, bad = learner.base.copy(), -learner.base
    for seed in range(10):
        assert learner.step(seed).ok
    learner.weights = bad
    assert not learner.step(10).ok  # put back by the callback, and the window emptied
    np.testing.assert_array_equal(learner.weights, good)
    after = [learner.step(seed) for seed in range(11, 18)]
    # the first good batch is where the count begins: five more make 500 examples
    assert [v.ok for v in after] == [False] * 5 + [True] * 2
    assert after[2].reasons == ("good for 200 examples again; publishing goes on after 500 (learning.guard.minimum)",)
    assert len(learner.stops) == 1


def test_going_back_leads_to_the_newest_version_that_proved_good() -> None:
    learner = Learner(0.0)
    for seed in range(30):
        if seed in (5, 20, 28):  # 28 is published 200 examples before the break
            learner.kept[f"v{seed}"] = learner.weights.copy()
            learner.guard.published(f"v{seed}", learner.progress.figures()["examples"])
        learner.step(seed)
    learner.weights = -learner.base
    learner.step(30)
    assert [good for _, good in learner.stops] == ["v20"]


def test_a_guard_goes_on_from_its_state() -> None:
    learner = Learner(0.0)
    for seed in range(8):
        learner.step(seed)
    learner.guard.published("v8", 800)
    learner.weights = -learner.base
    learner.step(8)
    again = Guard(learner.guard.config)
    again.load(learner.guard.state())
    assert again.stopped
    assert again.good == "v0"
    assert again.state() == learner.guard.state()


def figures(**changes: Any) -> dict[str, Any]:
    its = {
        "examples": 20_000, "positives": 1000, "not_finite": 0,
        "auc": 0.7, "logloss": 0.5, "ne": 0.9, "calibration": 1.0,
        "base": {"auc": 0.7, "logloss": 0.5, "ne": 0.9, "calibration": 1.0},
        "auc_gain": 0.0, "auc_error": 0.002, "excess": 0.0, "excess_error": 0.001, "recent": [],
    }  # fmt: skip
    return {"examples": 20_000, "tasks": {"click": its | changes}}


@pytest.mark.parametrize(
    ("changes", "ok", "says"),
    [
        ({}, True, ""),
        ({"auc": 0.67, "auc_gain": -0.03}, False, "AUC of task 'click' is 0.6700"),
        ({"auc": 0.675, "auc_gain": -0.025}, True, ""),  # past .02, but by 2.5 standard errors
        ({"excess": 0.03}, False, "1.06 times the 0.5000"),
        ({"excess": 0.027}, True, ""),  # 1.054, by 2 standard errors
        ({"calibration": 1.5}, False, "predicted 1.500 times as often"),
        ({"calibration": 0.5}, False, "predicted 0.500 times as often"),
        ({"calibration": 1.5, "positives": 16}, True, ""),  # sixteen positives cannot tell
        # a quarter of the window: twice as much is allowed
        ({"examples": 5000, "excess": 0.052}, True, ""),
        ({"examples": 5000, "excess": 0.054}, False, "at most 1.1 is allowed over so many"),
        ({"examples": 5000, "auc": 0.655, "auc_gain": -0.045}, True, ""),
        ({"examples": 5000, "auc": 0.653, "auc_gain": -0.047}, False, "at most 0.04 is allowed over so many"),
        ({"calibration": None, "auc_gain": None, "base": None}, True, ""),
        ({"examples": 100, "excess": 9.0}, True, ""),  # fewer than the minimum
    ],
)
def test_a_figure_past_its_limit_by_more_than_chance_stops_and_is_named(
    changes: dict[str, Any], ok: bool, says: str
) -> None:
    verdict = Guard(GuardConfig()).judge(figures(**changes))
    assert verdict.ok is ok
    assert says in " ".join(verdict.reasons)


def test_going_back_to_a_bundle_that_is_calibrated_no_better_mends_nothing() -> None:
    """The first window of a stream may hold clicks alone: both models say half of what is seen."""
    base = {"auc": None, "logloss": 0.7, "ne": None, "calibration": 0.45}
    changes: dict[str, Any] = {"positives": 20_000, "auc": None, "auc_gain": None, "base": base}
    assert Guard(GuardConfig()).judge(figures(**changes, calibration=0.5)).ok
    assert not Guard(GuardConfig()).judge(figures(**changes, calibration=0.4)).ok


@pytest.mark.parametrize(
    ("examples", "worse", "ok"),
    # 1.05 over the window of 20,000; over 64 and 512 examples sqrt(312.5) and sqrt(39.06) times as much
    [(64, 0.40, True), (64, 0.50, False), (512, 0.14, True), (512, 0.17, False)],
)
def test_the_fewer_examples_the_more_it_takes_to_be_a_break(examples: int, worse: float, ok: bool) -> None:
    """A healthy learner meets users whom it does not know: over 64 of their films it was 1.5 times as bad."""
    recent = {"examples": examples, "positives": examples // 2, "base_logloss": 0.5, "excess_error": 0.001}
    few = figures(recent=[recent | {"excess": worse}], examples=600)
    assert Guard(GuardConfig()).judge(few).ok is ok


def test_negatives_alone_do_not_make_a_break() -> None:
    """512 rows without a positive: a model that says 1.5 % where the base says 1 % has a larger loss on each."""
    recent = {"examples": 512, "positives": 0, "base_logloss": 0.01, "excess": 0.005, "excess_error": 0.0001}
    base = {"auc": 0.7, "logloss": 0.056, "ne": 0.9, "calibration": 1.0}
    assert Guard(GuardConfig()).judge(figures(recent=[recent], base=base)).ok
    broken = recent | {"excess": 0.1}
    assert not Guard(GuardConfig()).judge(figures(recent=[broken], base=base)).ok
