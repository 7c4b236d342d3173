"""Calibration: what it fits, that it never re-orders, that it survives the bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from engine.errors import BundleError
from engine.metrics import ece, logloss, sigmoid
from engine.training.calibration import Calibration


def overconfident(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits three times and one unit too high: the truth is sigmoid((x - 1) / 3)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 3, rows).astype(np.float32)
    return x, (rng.random(rows) < sigmoid((x - 1) / 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_calibration_mends_an_overconfident_model_on_rows_it_has_not_seen(kind):
    fitted = Calibration.fit(*overconfident(20_000), kind)
    x, y = overconfident(20_000, seed=1)
    assert ece(y, sigmoid(x)) > 0.12
    assert ece(y, fitted.apply(x)) < 0.02  # twenty bins of a thousand rows: .013 is noise
    assert logloss(y, fitted.apply(x)) < logloss(y, sigmoid((x - 1) / 3)) + 0.002  # as good as the truth


def test_platt_finds_the_true_slope_and_is_scikit_learns_without_a_penalty():
    x, y = overconfident(20_000)
    fitted = Calibration.fit(x, y, "platt")
    peer = LogisticRegression(C=1e9, tol=1e-8).fit(x[:, None], y).predict_proba(x[:, None])[:, 1]
    np.testing.assert_allclose(fitted.apply(x), peer, atol=2e-3)
    assert fitted.slope == pytest.approx(1 / 3, abs=0.01)


def test_platt_is_not_thrown_off_by_wide_logits():
    x, y = overconfident(5_000)
    narrow, wide = Calibration.fit(x, y, "platt"), Calibration.fit(x * 1000, y, "platt")
    np.testing.assert_allclose(narrow.apply(x), wide.apply(x * 1000), atol=1e-4)


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_a_row_of_weight_three_is_three_rows(kind):
    x, y = overconfident(3_000)
    weight = np.random.default_rng(2).integers(1, 4, len(x))
    weighted = Calibration.fit(x, y, kind, weight)
    repeated = Calibration.fit(np.repeat(x, weight), np.repeat(y, weight), kind)
    np.testing.assert_allclose(weighted.apply(x), repeated.apply(x), atol=1e-6)


def test_platt_does_not_reorder_what_a_model_orders_the_wrong_way_round():
    x, y = overconfident(5_000)
    fitted = Calibration.fit(-x, y, "platt")
    assert fitted.slope > 0
    assert fitted.apply(-x).mean() == pytest.approx(y.mean(), abs=1e-3)


def test_isotonic_is_near_scikit_learns_where_rows_are_many():
    x, y = overconfident(50_000)
    peer = IsotonicRegression().fit(x, y)
    middle = np.linspace(-5, 7, 200)
    assert np.abs(Calibration.fit(x, y, "isotonic").apply(middle) - peer.predict(middle)).max() < 0.05


def test_isotonic_by_hand():
    # Blocks: logit -1 (labels 0, 0, 1) and logit 1 (1, 1, 0, 1); rate 4/7; two rows of it are added to each block.
    fitted = Calibration.fit([-1, -1, -1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1], "isotonic")
    low, high = (1 + 2 * 4 / 7) / 5, (3 + 2 * 4 / 7) / 6
    np.testing.assert_allclose(fitted.apply(np.array([-1.0, 1.0])), [low, high], rtol=1e-6)
    # beyond the knots the logit is shifted by what it was shifted by at the last knot
    shift = np.log(high / (1 - high)) - 1
    np.testing.assert_allclose(fitted.apply(np.array([3.0])), sigmoid(3 + shift), rtol=1e-6)


def test_none_is_the_sigmoid():
    x = np.array([-2.0, 0.0, 3.0], dtype=np.float32)
    np.testing.assert_allclose(Calibration.fit(x, [0, 1, 1], "none").apply(x), 1 / (1 + np.exp(-x)), rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_one_class_teaches_nothing(labels):
    assert Calibration.fit([1.0, 2.0, 3.0], labels, "isotonic").kind == "none"


def test_logits_all_equal_give_the_base_rate():
    assert Calibration.fit([0.5] * 4, [1, 0, 0, 0], "isotonic").apply([0.5])[0] == pytest.approx(0.25)


@given(
    st.sampled_from(["isotonic", "platt", "none"]),
    st.lists(st.tuples(st.floats(-30, 30, width=32), st.integers(0, 1)), min_size=1, max_size=60),
)
@settings(deadline=None, max_examples=150)
def test_probabilities_lie_strictly_between_zero_and_one_and_never_reorder(kind, rows):
    x, y = map(np.array, zip(*rows, strict=True))
    p = Calibration.fit(x, y, kind).apply(np.sort(np.append(x, [-1e4, -40, 0, 40, 1e4])))
    assert p.dtype == np.float32
    assert ((p > 0) & (p < 1)).all()
    assert (np.diff(p) >= 0).all()


def test_candidates_that_differ_never_tie_so_ranking_by_probability_is_ranking_by_logit():
    fitted = Calibration.fit(*overconfident(2_000), "isotonic")
    x = np.linspace(-12, 12, 2_000)
    assert (np.diff(fitted.apply(x)) > 0).all()


@pytest.mark.parametrize("kind", ["isotonic", "platt", "none"])
def test_tensors_bring_the_same_probabilities_back(kind):
    x, y = overconfident(500)
    fitted = Calibration.fit(x, y, kind)
    again = Calibration.from_tensors(fitted.to_tensors("click."), "click.")
    assert again.kind == fitted.kind
    assert (again.apply(torch.from_numpy(x)) == fitted.apply(x)).all()


def test_a_map_that_falls_is_refused():
    tensors = Calibration.fit(*overconfident(500), "isotonic").to_tensors()
    tensors["values"] = tensors["values"].flip(0)
    with pytest.raises(BundleError, match="not an increasing map"):
        Calibration.from_tensors(tensors)


def test_a_missing_tensor_is_named():
    with pytest.raises(BundleError, match="calibration 'click' cannot be read"):
        Calibration.from_tensors({}, "click.")


def test_logits_that_are_not_finite_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="diverged"):
        Calibration.fit([np.nan, 1.0], [0, 1], "platt")
    with pytest.raises(ValueError, match="'beta' is not one of isotonic, platt, none"):
        Calibration.fit([0.0, 1.0], [0, 1], "beta")
