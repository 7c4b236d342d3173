"""The stability index against values computed by hand, and a stream that moves away from what was trained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.encoding import MISSING
from engine.errors import BundleError, CheckpointError
from engine.hashing import fingerprint
from engine.streaming.learning import drift
from engine.streaming.learning.drift import BUCKETS, Drift, Reference, index, judged, reference


@pytest.fixture(scope="module")
def trained(film_data: Any) -> Reference:
    return reference(film_data)


def stream(film_data: Any, rows: int, seed: int = 0) -> Any:
    """Batches drawn from the training rows."""
    random = np.random.default_rng(seed)
    known = film_data.arrays["split.train"]
    for _ in range(rows // 500):
        yield film_data.batch(known[random.integers(len(known), size=500)])


def test_the_index_is_the_sum_over_buckets_of_share_differences_by_log_ratios() -> None:
    # with half a row more in each bucket the shares are .25 .25 .5 and .5 .25 .25
    expected, actual = np.array([0.5, 0.5, 1.5]), np.array([1.5, 0.5, 0.5])
    assert index(expected, actual) == pytest.approx(0.25 * math.log(2) + 0.25 * math.log(2))
    assert index(expected, expected) == 0.0
    assert np.isfinite(index(np.array([0, 1000]), np.array([1000, 0])))


def test_the_reference_counts_each_training_row_once(film_data: Any, trained: Reference) -> None:
    counts: dict[str, np.ndarray] = {}
    for batch in film_data.batches("train", 97):
        for name, its in batch.jagged().items():
            mine = counts.setdefault(name, np.zeros(BUCKETS + 1, np.int64))
            for values in its.to_dense():
                for value in values.tolist() or [MISSING]:  # a row without values counts as missing
                    mine[BUCKETS if value == MISSING else value % BUCKETS] += 1
    assert trained.rows == film_data.rows["train"]
    for name, its in counts.items():
        np.testing.assert_array_equal(trained.counts[name], its)
    year = trained.counts["year"]
    assert year.sum() == trained.rows
    assert year[-1] == 0  # no film is without a year
    assert len(trained.edges["year"]) == 9
    np.testing.assert_allclose(year[:-1] / trained.rows, 0.1, atol=0.04)  # deciles of 30 years


def test_a_missing_number_and_a_missing_id_have_buckets_of_their_own(film_data: Any, trained: Reference) -> None:
    batch = next(stream(film_data, 500))
    watching = Drift(trained, film_data.schema)
    batch.dense_item[:100] = 0.0
    ids = batch.ids.to_dict()
    place = batch.ids.keys().index("user_id")
    start = sum(batch.ids.length_per_key()[:place])
    batch.ids.values()[start : start + 50] = MISSING
    assert len(ids["user_id"].values()) == 500
    watching.observe(batch)
    assert watching.counts["year"][-1] == 100
    assert watching.counts["user_id"][BUCKETS] == 50


def test_what_training_saw_is_stable_and_a_new_crowd_drifts(film_data: Any, trained: Reference) -> None:
    same = Drift(trained, film_data.schema)
    for batch in stream(film_data, 5000):
        same.observe(batch)
    found = same.psi()
    assert set(found) == {"user_id", "item_id", "genres", "year", "history"}
    assert max(found.values()) < 0.1
    assert {judged(v) for v in found.values()} == {"stable"}

    moved = Drift(trained, film_data.schema)
    crowd = torch.tensor([fingerprint(f"new user {n}") for n in range(7)])
    for batch in stream(film_data, 5000):
        place = batch.ids.keys().index("user_id")
        start = sum(batch.ids.length_per_key()[:place])
        batch.ids.values()[start : start + 500] = crowd[torch.arange(500) % 7]
        batch.dense_item += 1.0  # a standard deviation later
        moved.observe(batch)
    found = moved.psi()
    assert list(found)[:2] == ["user_id", "year"] or list(found)[:2] == ["year", "user_id"]
    assert min(found["user_id"], found["year"]) > 0.25
    assert found["genres"] < 0.1
    assert judged(found["user_id"]) == "drifted"


def test_nothing_is_told_of_a_few_rows(film_data: Any, trained: Reference) -> None:
    watching = Drift(trained, film_data.schema)
    for batch in stream(film_data, 1500):
        watching.observe(batch)
    assert watching.psi() == {}
    assert watching.examples == 1500


def test_thinned_negatives_count_as_many_as_they_stand_for(film_data: Any, trained: Reference) -> None:
    """Every row twice is every row with weight 2; the index is of shares."""
    plain, weighted = Drift(trained, film_data.schema), Drift(trained, film_data.schema)
    for batch in stream(film_data, 3000):
        plain.observe(batch)
        weighted.observe(batch, np.full(500, 2.0, np.float32))
    for name, value in plain.psi().items():
        assert weighted.psi()[name] == pytest.approx(value, abs=0.01)


def test_old_blocks_are_left_behind(film_data: Any, trained: Reference) -> None:
    watching = Drift(trained, film_data.schema, window=2000)
    for batch in stream(film_data, 4000):
        batch.dense_item += 3.0
        watching.observe(batch)
    assert watching.psi()["year"] > 1
    for batch in stream(film_data, 4500, seed=1):
        watching.observe(batch)
    assert watching.psi()["year"] < 0.1
    assert watching.examples == 2500


def test_a_reference_comes_back_from_its_file_and_a_state_exactly(
    film_data: Any, trained: Reference, tmp_path: Any
) -> None:
    save_file(trained.to_tensors(), tmp_path / "drift.safetensors")
    again = Reference.from_tensors(load_file(tmp_path / "drift.safetensors"), film_data.schema)
    assert again.rows == trained.rows
    one, other = Drift(trained, film_data.schema), Drift(again, film_data.schema)
    batches = list(stream(film_data, 6000))
    for batch in batches[:6]:
        one.observe(batch)
    other.load(one.state())
    for batch in batches[6:]:
        one.observe(batch)
        other.observe(batch)
    assert one.psi() == other.psi()
    np.testing.assert_array_equal(one.state()["blocks"], other.state()["blocks"])


def test_a_bundle_keeps_the_reference_of_its_training_rows(
    film_data: Any, trained: Reference, tiny_bundle: Any
) -> None:
    from engine.bundle import Bundle, show

    kept = Bundle.open(tiny_bundle).drift
    assert kept is not None
    assert kept.rows == trained.rows
    for name, its in trained.counts.items():
        np.testing.assert_array_equal(kept.counts[name], its)
    assert "drift.safetensors" in show(tiny_bundle)["files"]


def test_a_reference_that_does_not_fit_is_refused_by_name(film_data: Any, trained: Reference) -> None:
    tensors = trained.to_tensors()
    with pytest.raises(BundleError, match="'year:edges'"):
        Reference.from_tensors({k: v for k, v in tensors.items() if k != "year:edges"}, film_data.schema)
    with pytest.raises(BundleError, match="not one count a bucket"):
        Reference.from_tensors(tensors | {"genres:counts": torch.zeros(3, dtype=torch.int64)}, film_data.schema)
    with pytest.raises(BundleError, match="does not ascend"):
        Reference.from_tensors(tensors | {"year:edges": torch.zeros(9)}, film_data.schema)
    with pytest.raises(CheckpointError, match="other features"):
        Drift(trained, film_data.schema).load({"blocks": np.zeros((2, 3)), "examples": np.zeros(2, np.int64)})


def test_a_sample_is_spread_over_the_whole_training_part(film_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SAMPLE", 200)
    some = reference(film_data)
    assert some.rows == 200
    assert some.counts["user_id"].sum() == 200
    assert np.count_nonzero(some.counts["item_id"]) > 15
