"""Scores and bins of numbers, against numpy."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.numeric import NumericTransforms
from engine.data.statistics import IdCounter, IdStatistics
from engine.hashing import fingerprint
from engine.schema import FeatureSpec

ANY_SPEED = settings(deadline=None)  # a loaded machine is no failure


def fit(values: list[float], transform: str, bins: int = 4, chunk: int = 3) -> NumericTransforms:
    feature = FeatureSpec(name="x", kind="numeric", transform=transform, bins=bins)
    array = np.array(values, np.float32)
    parts = [array[i : i + chunk] for i in range(0, len(array), chunk)]
    return NumericTransforms.fit({"x": parts}, [feature], len(array))


FINITE = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)


@ANY_SPEED
@given(FINITE, st.integers(1, 7))
def test_standard_scores_are_numpys_whatever_the_chunks(values: list[float], chunk: int) -> None:
    array = np.array(values, np.float64)
    found = fit(values, "standard", chunk=chunk)["x"]
    assert found.mean == pytest.approx(array.mean(), rel=1e-9, abs=1e-6)
    if array.std() > 1e-3:
        assert found.std == pytest.approx(array.std(), rel=1e-6)


def test_log_takes_negative_counts() -> None:
    """log1p of the magnitude with the sign: -3 -> -log 4, 0 -> 0, 3 -> log 4; mean 0, deviation log(4) sqrt(2/3)."""
    scores = fit([-3, 0, 3], "log")["x"](np.array([-3, 0, 3], np.float32))
    np.testing.assert_allclose(scores, [-np.sqrt(1.5), 0, np.sqrt(1.5)], rtol=1e-6)


def test_missing_and_infinite_values_teach_nothing_and_read_as_the_mean() -> None:
    transform = fit([1, np.nan, 3, np.inf], "standard")["x"]
    assert (transform.mean, transform.std) == (2.0, 1.0)
    assert transform(np.array([np.nan, np.inf, -np.inf, 2], np.float32)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("transform", ["standard", "log", "bins"])
@pytest.mark.parametrize("values", [[7.0, 7.0, 7.0], [np.nan, np.nan], []])
def test_constant_and_empty_columns_stay_finite(transform: str, values: list[float]) -> None:
    found = fit(values, transform)["x"](np.array([7, 8, np.nan], np.float32))
    assert np.isfinite(found).all()


def test_bins_hold_equal_shares_and_missing_values_a_bin_of_their_own() -> None:
    """Eight values in four bins: edges 3, 5 and 7; each holds two; a missing one reads as any missing id."""
    found = fit([1, 2, 3, 4, 5, 6, 7, 8], "bins")["x"](np.array([1, 2, 3, 4, 5, 6, 7, 8, 99, -99, np.nan], np.float32))
    expected = [fingerprint(b) for b in (0, 0, 1, 1, 2, 2, 3, 3, 3, 0)] + [fingerprint("")]
    assert found.tolist() == expected


def test_a_value_that_fills_several_bins_keeps_one() -> None:
    edges = fit([0] * 90 + [1] * 10, "bins", bins=32)["x"].edges
    assert edges is not None
    assert edges.tolist() == [0.0, 1.0]


@ANY_SPEED
@given(FINITE, st.sampled_from(["standard", "log", "bins"]))
def test_saved_transforms_are_equal(values: list[float], transform: str) -> None:
    fitted = fit(values, transform)
    again = NumericTransforms.from_tensors(fitted.to_tensors())
    asked = np.array([*values, np.nan, 0.5, -1e9], np.float32)
    assert again["x"](asked).tolist() == fitted["x"](asked).tolist()


@ANY_SPEED
@given(st.lists(st.lists(st.integers(-5, 5), max_size=12), max_size=8))
def test_ids_are_counted_as_numpy_counts_them(parts: list[list[int]]) -> None:
    counter = IdCounter()
    for part in parts:
        counter.add(np.array(part, np.int64))
    found = counter.statistics()
    ids, counts = np.unique(np.array([*chain(*parts)], np.int64), return_counts=True)
    assert (found.fingerprints.tolist(), found.counts.tolist()) == (ids.tolist(), counts.tolist())
    again = IdStatistics.from_tensors(found.to_tensors("a.b"), "a.b")
    assert again.fingerprints.tolist() == ids.tolist()
