"""Rolling and cumulative figures against scikit-learn and against a slow recomputation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.errors import CheckpointError
from engine.streaming.join.emitted import CORRECTION, NEGATIVE, POSITIVE
from engine.streaming.learning.progress import FrozenBase, ProgressiveValidation


def stream(n: int, seed: int = 0, tasks: int = 1, rate: float = 0.3):
    """Labels, a good model's and a worse model's probabilities, times."""
    random = np.random.default_rng(seed)
    logit = random.normal(np.log(rate / (1 - rate)), 1.0, (n, tasks))
    labels = (random.random((n, tasks)) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    worse = 1 / (1 + np.exp(-(logit + random.normal(0, 1.0, (n, tasks)))))
    good = 1 / (1 + np.exp(-logit))
    return labels, good.astype(np.float32), worse.astype(np.float32), 1e9 + np.arange(n, dtype=np.float64)


def kinds(labels: np.ndarray) -> np.ndarray:
    return np.where(labels[:, 0] > 0.5, POSITIVE, NEGATIVE).astype(np.int8)


def fed(progress: ProgressiveValidation, labels, live, base, seconds, size: int = 64, weight=None):
    weight = np.ones(len(labels), np.float32) if weight is None else weight
    for i in range(0, len(labels), size):
        part = slice(i, i + size)
        one = None if base is None else base[part]
        progress.observe(labels[part], live[part], one, weight[part], seconds[part], kinds(labels[part]))
    return progress


def test_the_window_s_figures_are_scikit_learn_s_over_the_newest_rows() -> None:
    labels, live, base, seconds = stream(5000)
    its = fed(ProgressiveValidation(["click"], 2000), labels, live, base, seconds).figures()["tasks"]["click"]
    y, p, b = labels[-2000:, 0], live[-2000:, 0].astype(np.float64), base[-2000:, 0].astype(np.float64)
    assert its["examples"] == 2000
    assert its["positives"] == int(y.sum())
    assert its["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert its["logloss"] == pytest.approx(log_loss(y, p), rel=1e-9)
    assert its["base"]["auc"] == pytest.approx(roc_auc_score(y, b), abs=1e-12)
    assert its["auc_gain"] == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, b), abs=1e-9)
    assert its["excess"] == pytest.approx(log_loss(y, p) - log_loss(y, b), rel=1e-6)
    assert its["ne"] == pytest.approx(log_loss(y, p) / log_loss(y, np.full(2000, y.mean())), rel=1e-6)
    assert its["calibration"] == pytest.approx(p.sum() / y.sum(), rel=1e-9)


def test_the_figures_since_the_start_are_of_all_rows() -> None:
    labels, live, base, seconds = stream(20_000, seed=1)
    whole = fed(ProgressiveValidation(["click"], 500), labels, live, base, seconds, size=777).figures()
    its = whole["tasks"]["click"]["since_start"]
    assert its["examples"] == whole["examples"] == 20_000
    assert its["auc"] == pytest.approx(roc_auc_score(labels[:, 0], live[:, 0]), abs=1e-5)  # of 4096 bins
    assert its["base"]["auc"] == pytest.approx(roc_auc_score(labels[:, 0], base[:, 0]), abs=1e-5)
    assert its["logloss"] == pytest.approx(log_loss(labels[:, 0], live[:, 0].astype(np.float64)), rel=1e-9)
    assert its["calibration"] == pytest.approx(live.sum(dtype=np.float64) / labels.sum(), rel=1e-9)


def test_errors_allow_for_rows_of_one_user_that_lie_together_and_are_alike() -> None:
    """Fifty rows a user, whom one of the two models knows better: the errors are the spread over samples."""
    excess, errors, gains, auc_errors = [], [], [], []
    for seed in range(150):
        labels, live, base, seconds = stream(4000, seed)
        known = np.repeat(np.random.default_rng(1000 + seed).random(80) < 0.5, 50)[:, None]
        better = np.where(known, live, base)
        worse = np.where(known, base, live)
        its = fed(ProgressiveValidation(["click"], 4000), labels, better, worse, seconds).figures()["tasks"]["click"]
        excess.append(its["excess"])
        errors.append(its["excess_error"])
        gains.append(its["auc_gain"])
        auc_errors.append(its["auc_error"])
    assert np.mean(errors) == pytest.approx(np.std(excess), rel=0.15)
    assert np.mean(auc_errors) == pytest.approx(np.std(gains), rel=0.15)


def test_the_error_of_an_auc_s_gain_is_how_far_it_spreads_over_samples() -> None:
    """DeLong's estimate from one sample against the spread over 400 others."""
    gains, errors = [], []
    for seed in range(400):
        labels, live, base, seconds = stream(400, seed=seed)
        its = fed(ProgressiveValidation(["click"], 400), labels, live, base, seconds).figures()["tasks"]["click"]
        gains.append(its["auc_gain"])
        errors.append(its["auc_error"])
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.12)


def test_thinned_negatives_stand_for_those_left_out() -> None:
    labels, live, _, seconds = stream(40_000, seed=2, rate=0.05)
    kept = (labels[:, 0] > 0.5) | (np.random.default_rng(3).random(len(labels)) < 0.25)
    weight = np.where(labels[:, 0] > 0.5, 1.0, 4.0).astype(np.float32)
    all_of_them = fed(ProgressiveValidation(["click"], 40_000), labels, live, None, seconds).figures()
    thinned = fed(
        ProgressiveValidation(["click"], 40_000), labels[kept], live[kept], None, seconds[kept], weight=weight[kept]
    ).figures()
    a, b = all_of_them["tasks"]["click"], thinned["tasks"]["click"]
    assert b["calibration"] == pytest.approx(a["calibration"], rel=0.02)
    assert b["logloss"] == pytest.approx(a["logloss"], rel=0.03)
    assert b["auc"] == pytest.approx(a["auc"], abs=0.01)
    assert b["since_start"]["calibration"] == pytest.approx(b["calibration"], rel=1e-9)
    blind = fed(ProgressiveValidation(["click"], 40_000), labels[kept], live[kept], None, seconds[kept]).figures()
    assert blind["tasks"]["click"]["calibration"] < 0.6 * a["calibration"]  # without the weights


def test_corrections_are_counted_and_not_judged() -> None:
    labels, live, base, seconds = stream(100)
    progress = ProgressiveValidation(["click"], 1000)
    kind = kinds(labels)
    kind[::2] = CORRECTION
    progress.observe(labels, live, base, np.ones(100, np.float32), seconds, kind)
    found = progress.figures()
    assert (found["examples"], found["corrections"], found["window"]) == (50, 50, 50)
    y, p = labels[1::2, 0], live[1::2, 0]
    assert found["tasks"]["click"]["auc"] == pytest.approx(roc_auc_score(y, p))


def test_a_task_is_judged_on_the_rows_that_speak_of_it() -> None:
    labels, live, base, seconds = stream(600, tasks=2, seed=4)
    labels[::3, 1] = np.nan
    found = fed(ProgressiveValidation(["click", "buy"], 1000), labels, live, base, seconds).figures()["tasks"]
    told = np.isfinite(labels[:, 1])
    assert found["click"]["examples"] == 600
    assert found["buy"]["examples"] == 400
    assert found["buy"]["auc"] == pytest.approx(roc_auc_score(labels[told, 1], live[told, 1]))


def test_scores_that_are_no_numbers_are_counted_and_nothing_else_is_lost() -> None:
    labels, live, base, seconds = stream(300)
    live[7] = np.nan
    found = fed(ProgressiveValidation(["click"], 1000), labels, live, base, seconds).figures()
    its = found["tasks"]["click"]
    assert its["not_finite"] == 1
    keep = np.arange(300) != 7
    assert its["auc"] == pytest.approx(roc_auc_score(labels[keep, 0], live[keep, 0]))
    json.dumps(found, allow_nan=False)


def test_rows_of_one_class_have_no_auc_and_no_base_no_comparison() -> None:
    progress = ProgressiveValidation(["click"], 10)
    zeros, half = np.zeros((4, 1), np.float32), np.full((4, 1), 0.5, np.float32)
    progress.observe(zeros, half, None, np.ones(4, np.float32), np.arange(4.0), np.full(4, NEGATIVE, np.int8))
    its = progress.figures()["tasks"]["click"]
    assert its["auc"] is its["base"] is its["calibration"] is None
    assert its["recent"] == []
    assert its["logloss"] == pytest.approx(np.log(2))
    json.dumps(ProgressiveValidation(["click"], 10).figures(), allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), min_size=1, max_size=12), window=st.integers(1, 300))
def test_any_cutting_into_batches_gives_the_same_figures(cuts: list[int], window: int) -> None:
    n = sum(cuts)
    labels, live, base, seconds = stream(n, seed=5, tasks=2)
    cut = ProgressiveValidation(["a", "b"], window)
    start = 0
    for size in cuts:
        part = slice(start, start + size)
        weight = np.ones(size, np.float32)
        cut.observe(labels[part], live[part], base[part], weight, seconds[part], kinds(labels[part]))
        start += size
    once = fed(ProgressiveValidation(["a", "b"], window), labels, live, base, seconds, size=n)
    for task in ("a", "b"):
        one, other = (x.figures()["tasks"][task] for x in (cut, once))
        since, other_since = one.pop("since_start"), other.pop("since_start")
        assert one == other
        assert since["auc"] == other_since["auc"]
        assert since["logloss"] == pytest.approx(other_since["logloss"], rel=1e-12)


def test_a_loaded_state_goes_on_exactly() -> None:
    labels, live, base, seconds = stream(3000, seed=6)
    whole = fed(ProgressiveValidation(["click"], 700, every=100), labels, live, base, seconds, size=50)
    half = fed(
        ProgressiveValidation(["click"], 700, every=100),
        labels[:1500],
        live[:1500],
        base[:1500],
        seconds[:1500],
        size=50,
    )
    again = ProgressiveValidation(["click"], 700, every=100)
    again.load({name: value.copy() for name, value in half.state().items()})
    fed(again, labels[1500:], live[1500:], base[1500:], seconds[1500:], size=50)
    assert again.figures() == whole.figures()
    assert again.curve == whole.curve
    for name, value in whole.state().items():
        np.testing.assert_array_equal(again.state()[name], value)


def test_a_state_of_another_window_is_refused_by_name() -> None:
    state = ProgressiveValidation(["click"], 100).state()
    with pytest.raises(CheckpointError, match=r"learning\.guard\.window"):
        ProgressiveValidation(["click"], 200).load(state)
    state.pop("base")
    with pytest.raises(CheckpointError, match="'base' is missing"):
        ProgressiveValidation(["click"], 100).load(state)


def test_the_curve_has_a_point_every_so_many_examples_and_stays_bounded() -> None:
    labels, live, base, seconds = stream(4000, seed=7)
    curve = fed(ProgressiveValidation(["click"], 500, every=250), labels, live, base, seconds, size=50).curve
    assert [p["examples"] for p in curve] == list(range(250, 4001, 250))
    point = curve[7]  # after 2,000
    assert point["tasks"]["click"]["auc"] == pytest.approx(roc_auc_score(labels[1500:2000, 0], live[1500:2000, 0]))
    total = roc_auc_score(labels[:2000, 0], live[:2000, 0])
    assert point["tasks"]["click"]["total_auc"] == pytest.approx(total, abs=1e-4)
    assert point["seconds"] == seconds[1999]
    short = fed(ProgressiveValidation(["click"], 500, every=50, points=10), labels, live, base, seconds, size=50).curve
    assert len(short) < 10
    assert short[-1]["examples"] <= 4000
    steps = np.diff([p["examples"] for p in short])
    assert (steps == steps[0]).all()


def test_an_emptied_window_keeps_what_is_since_the_start() -> None:
    labels, live, base, seconds = stream(500, seed=8)
    progress = fed(ProgressiveValidation(["click"], 200), labels, live, base, seconds)
    progress.clear()
    found = progress.figures()
    assert (found["examples"], found["window"]) == (500, 0)
    assert found["tasks"]["click"]["examples"] == 0
    assert found["tasks"]["click"]["since_start"]["examples"] == 500


def test_the_frozen_base_gives_the_served_bundle_s_probabilities(
    tiny_bundle: Path, film_data: Any, plugins: Any
) -> None:
    bundle = Bundle.open(tiny_bundle)
    scorer_class = plugins.get("scorers", "inproc")
    scorer = scorer_class(scorer_class.Options())
    scorer.load(tiny_bundle)
    items = bundle.catalogue.ids(np.arange(8))
    request = ScoreRequest({"user_id": "u3"}, {"item_id": ["4", "9"]}, items)
    served = scorer.score(request).tasks["liked"]
    found = FrozenBase(bundle, plugins)(bundle.encoder.encode_request(request, bundle.catalogue))
    assert found.shape == (8, 1)
    np.testing.assert_allclose(found[:, 0], served, rtol=1e-5)
