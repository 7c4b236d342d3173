"""Each figure against scikit-learn or a sum done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from engine import metrics

scored = st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=60)


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, s, u = zip(*rows, strict=True)
    return np.array(y, dtype=np.float32), np.array(s, dtype=np.float32), np.array(u, dtype=np.int64)


@given(scored)
@settings(deadline=None, max_examples=150)
def test_auc_is_scikit_learns_also_with_ties(rows):
    y, s, _ = columns(rows)
    if len(set(y)) == 1:
        assert metrics.auc(y, s) is None
    else:
        assert metrics.auc(y, s) == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)


@given(scored)
@settings(deadline=None, max_examples=150)
def test_gauc_is_the_impression_weighted_mean_of_each_users_auc(rows):
    y, s, u = columns(rows)
    total = weight = 0.0
    for user in set(u):  # the slow way, with scikit-learn
        mine = u == user
        if len(set(y[mine])) == 2:
            total += mine.sum() * sk.roc_auc_score(y[mine], s[mine])
            weight += mine.sum()
    if weight:
        assert metrics.gauc(y, s, u) == pytest.approx(total / weight, abs=1e-12)
    else:
        assert metrics.gauc(y, s, u) is None


def test_gauc_without_users_is_undefined():
    assert metrics.gauc([0, 1], [0.1, 0.2], None) is None


def test_gauc_ignores_what_differs_only_between_users():
    # user 7: right order, user 9: wrong order; the level of each user's scores does not matter
    assert metrics.gauc([0, 1, 0, 1], [1, 2, 200, 100], [7, 7, 9, 9]) == 0.5


def test_nan_scores_give_no_auc():
    assert metrics.auc([0, 1], [np.nan, 1.0]) is None


def test_no_rows_give_no_figures():
    for figure in (metrics.auc, metrics.logloss, metrics.normalised_entropy, metrics.ece):
        assert figure([], []) is None


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 labels but 1 scores"):
        metrics.auc([0, 1], [0.5])


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.001, 0.999)), min_size=1, max_size=50))
@settings(deadline=None, max_examples=100)
def test_logloss_is_scikit_learns(rows):
    y, p = map(np.array, zip(*rows, strict=True))
    assert metrics.logloss(y, p) == pytest.approx(sk.log_loss(y, p, labels=[0, 1]), rel=1e-9)


def test_logloss_of_a_certain_mistake_is_finite():
    assert metrics.logloss([1.0], [0.0]) == pytest.approx(-np.log(1e-7))


def test_saying_the_mean_label_has_normalised_entropy_one():
    y = np.array([1, 0, 0, 0])
    assert metrics.normalised_entropy(y, np.full(4, 0.25)) == pytest.approx(1.0)
    assert metrics.normalised_entropy(y, [0.9, 0.1, 0.1, 0.1]) < 0.3
    assert metrics.normalised_entropy([1, 1], [0.9, 0.9]) is None


def test_ece_by_hand_with_two_bins():
    # sorted .1 .2 | .6 .9: bins (.15 against 0) and (.75 against 1): (2 * .15 + 2 * .25) / 4
    assert metrics.ece([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], bins=2) == pytest.approx(0.2)


def test_ece_keeps_equal_predictions_in_one_bin():
    assert metrics.ece([0, 1, 0, 1], [0.5] * 4, bins=4) == pytest.approx(0.0)


def test_the_calibration_curve_has_bins_of_equal_rows_and_is_scikit_learns():
    rng = np.random.default_rng(1)
    p = rng.random(1000)
    y = (rng.random(1000) < p**2).astype(float)
    from sklearn.calibration import calibration_curve

    curve = metrics.calibration_curve(y, p, bins=10)
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="quantile")
    assert curve.rows.tolist() == [100] * 10
    np.testing.assert_allclose(curve.predicted, predicted, atol=2e-3)
    np.testing.assert_allclose(curve.observed, observed, atol=2e-2)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=80), st.integers(1, 30))
@settings(deadline=None, max_examples=100)
def test_every_row_is_in_one_bin_and_ece_lies_between_zero_and_one(rows, bins):
    y, p = map(np.array, zip(*rows, strict=True))
    curve = metrics.calibration_curve(y, p, bins)
    assert curve.rows.sum() == len(y)
    assert 1 <= len(curve.rows) <= bins
    assert 0 <= metrics.ece(y, p, bins) <= 1
    np.testing.assert_allclose(np.average(curve.observed, weights=curve.rows), y.mean())


def test_relative_improvement_counts_from_a_half():
    # .6 over .55: ten points above a half against five is 100 % more, not 9 %
    assert metrics.rel_impr(0.6, 0.55) == pytest.approx(1.0)
    assert metrics.rel_impr(0.6, None) is None
    assert metrics.rel_impr(0.6, 0.5) is None


# ----------------------------------------------------------------------------------------- ranked lists
RANKED = np.array([[4, 2, 9], [1, 3, -1], [7, 8, 0]])
QUERY = np.array([0, 0, 1, 0])
ITEM = np.array([2, 9, 5, 6])
COUNT = np.array([3, 1, 0])


def test_hits_mark_the_relevant_places():
    assert metrics.hits(RANKED, QUERY, ITEM).tolist() == [[False, True, True], [False] * 3, [False] * 3]


def test_a_short_lists_filler_never_counts():
    assert not metrics.hits([[-1, -1]], [0], [-1]).any()


def test_recall_ndcg_and_mrr_by_hand():
    hit = metrics.hits(RANKED, QUERY, ITEM)
    assert metrics.recall_at(hit, COUNT, 2) == pytest.approx((1 / 3 + 0) / 2)
    assert metrics.recall_at(hit, COUNT, 3) == pytest.approx((2 / 3 + 0) / 2)
    gain, best = 1 / np.log2(3) + 1 / np.log2(4), 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert metrics.ndcg_at(hit, COUNT, 3) == pytest.approx(gain / best / 2)
    assert metrics.mrr(hit, COUNT) == pytest.approx((1 / 2 + 0) / 2)


def test_ndcg_is_scikit_learns_when_the_whole_catalogue_is_ranked():
    rng = np.random.default_rng(3)
    scores, truth = rng.random((6, 12)), rng.random((6, 12)) < 0.3
    truth[:, 0] = True
    ranked = np.argsort(-scores, axis=1)
    query, item = np.nonzero(truth)
    hit = metrics.hits(ranked, query, item)
    assert metrics.ndcg_at(hit, truth.sum(axis=1), 5) == pytest.approx(sk.ndcg_score(truth, scores, k=5))


def test_no_query_with_anything_relevant_is_undefined():
    for value in (
        metrics.recall_at(np.zeros((2, 3)), [0, 0], 2),
        metrics.ndcg_at(np.zeros((2, 3)), [0, 0], 2),
        metrics.mrr(np.zeros((2, 3)), [0, 0]),
    ):
        assert value is None


def test_a_list_shorter_than_k_still_has_an_ndcg():
    hit = metrics.hits([[4]], [0, 0], [4, 5])
    assert metrics.ndcg_at(hit, [2], 10) == pytest.approx(1 / (1 + 1 / np.log2(3)))
