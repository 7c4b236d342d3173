"""A delta gives the scores of a bundle that was written with the weights it carries; one that does not fit, none."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import resident
from engine.components import Scores
from engine.errors import BundleError, DeltaGap
from engine.files import sha256
from engine.streaming.deltas import apply
from engine.streaming.deltas.delta import TableRows
from engine.training.calibration import Calibration
from plugins.scorers.inproc import InprocScorer
from tests.scorers.conftest import REQUESTS, Rewrite, delta, drawn, loaded, same_scores, written

State = dict[str, Tensor]


def some_rows(state: State, tables: dict[str, list[int]], seed: int = 0) -> dict[str, TableRows]:
    return {name: drawn(state[f"embedding.weights.{name}"], rows, seed) for name, rows in tables.items()}


# ------------------------------------------------------------------------------------------------ what it does
def test_a_deltas_calibration_is_what_the_logits_are_calibrated_with(tiny_bundle: Path, weights: State) -> None:
    """Twice the logit and one more, until a bundle or a newer chain brings its own again."""
    scorer, fresh = loaded(tiny_bundle), loaded(tiny_bundle)
    plain = loaded(tiny_bundle)
    straight = Calibration("platt", np.array([0, 1], np.float32), np.array([0, 1], np.float32))
    plain.apply(delta(tiny_bundle, dense=straight.to_tensors("calibration.liked.")))
    other = Calibration("platt", np.array([0, 1], np.float32), np.array([1, 3], np.float32), 2.0)
    rows = some_rows(weights, {"t_item_id": [3]})
    scorer.apply(delta(tiny_bundle, dense=other.to_tensors("calibration.liked.")))
    for request in REQUESTS:
        p = plain.score(request).tasks["liked"].astype(np.float64)
        wanted = 1 / (1 + np.exp(-(2 * np.log(p / (1 - p)) + 1)))
        np.testing.assert_allclose(scorer.score(request).tasks["liked"], wanted, atol=1e-6)
    before = [scorer.score(request).tasks["liked"] for request in REQUESTS]
    scorer.apply(delta(tiny_bundle, 2, tables=some_rows(weights, {"t_user_id": [39]})))  # of nobody who asks
    assert all(np.array_equal(a, scorer.score(r).tasks["liked"]) for a, r in zip(before, REQUESTS, strict=True))
    scorer.apply(delta(tiny_bundle, epoch=1, tables=rows))
    fresh.apply(delta(tiny_bundle, tables=rows))
    same_scores(scorer, fresh, 0)


@pytest.mark.parametrize("wrong", ["values", "task"])
def test_a_delta_with_a_calibration_that_is_none_changes_nothing(tiny_bundle: Path, weights: State, wrong: str) -> None:
    scorer, fresh = loaded(tiny_bundle), loaded(tiny_bundle)
    named = Calibration("platt", np.array([0, 1], np.float32), np.array([0, 1], np.float32)).to_tensors(
        "calibration.liked."
    )
    if wrong == "values":
        named["calibration.liked.values"] = torch.tensor([1.0, 0.0])
    else:
        named = {name.replace("liked", "bought"): value for name, value in named.items()}
    with pytest.raises(BundleError):
        scorer.apply(delta(tiny_bundle, tables=some_rows(weights, {"t_item_id": [3]}), dense=named))
    same_scores(scorer, fresh, 0)
    assert scorer.version == fresh.version


@pytest.mark.parametrize("megabytes", [256, 0], ids=["items' vectors ahead", "all a request"])
def test_scores_are_those_of_a_bundle_with_the_deltas_weights(
    tiny_bundle: Path, weights: State, rewrite: Rewrite, megabytes: int
) -> None:
    rows = some_rows(weights, {"t_item_id": [0, 4, 9, 30], "t_genres": [1, 3], "t_user_id": [0, 5, 12]})
    dense = {n: t * 1.1 + 0.01 for n, t in weights.items() if not n.startswith("embedding.") and t.is_floating_point()}
    scorer = loaded(tiny_bundle, item_vectors_mb=megabytes)
    for request in REQUESTS:
        scorer.score(request)  # vectors of recent users are kept: they must go where their rows are written
    scorer.apply(delta(tiny_bundle, tables=rows, dense=dense))
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, rows) | dense)))
    again = some_rows(weights, {"t_user_id": [5, 20], "t_genres": [2]}, seed=1)
    scorer.apply(delta(tiny_bundle, 2, tables=again))
    both = {**rows, **{n: TableRows(*_united(rows[n], again[n])) for n in again}}
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, both) | dense)))


def _united(a: TableRows, b: TableRows) -> tuple[np.ndarray, np.ndarray]:
    rows = dict(zip(a.rows.tolist(), a.values, strict=True)) | dict(zip(b.rows.tolist(), b.values, strict=True))
    return np.array(sorted(rows)), np.stack([rows[r] for r in sorted(rows)])


def test_rows_that_many_features_share_renew_all_that_read_them(unified_bundle: Path, rewrite: Rewrite) -> None:
    from engine.bundle.tensors import load_tensors

    state = load_tensors(unified_bundle / "model.safetensors")
    scorer = loaded(unified_bundle)
    for sequence, rows in enumerate(([7], [0, 1, 2, 49], list(range(50))), 1):
        for request in REQUESTS:
            scorer.score(request)
        part = some_rows(state, {"unified": rows}, seed=sequence)
        state |= written(state, part)
        scorer.apply(delta(unified_bundle, sequence, tables=part))
        same_scores(scorer, loaded(rewrite(unified_bundle, state)))


def test_values_that_travelled_as_int8_score_as_what_they_became(
    tiny_bundle: Path, weights: State, rewrite: Rewrite
) -> None:
    """A row as 127 steps of its largest number: what is decoded is what is applied, no more and no less."""
    part = drawn(weights["embedding.weights.t_item_id"], list(range(31)))
    scale = np.abs(part.values).max(axis=1, keepdims=True) / 127
    decoded = {"t_item_id": TableRows(part.rows, (np.rint(part.values / scale).astype(np.int8) * scale))}
    scorer = loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, tables=decoded))
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, decoded))))


def test_the_version_is_the_deltas_once_it_is_applied(tiny_bundle: Path, weights: State) -> None:
    scorer = loaded(tiny_bundle)
    first = delta(tiny_bundle, tables=some_rows(weights, {"t_item_id": [3]}))
    base = scorer.version
    assert scorer.score(REQUESTS[0]).version == base == first.parent
    scorer.apply(first)
    assert scorer.version == scorer.score(REQUESTS[0]).version == f"{base}+0.1"


def test_a_loaded_bundle_begins_the_chain_anew(tiny_bundle: Path, weights: State) -> None:
    scorer, fresh = loaded(tiny_bundle), loaded(tiny_bundle)
    first = delta(tiny_bundle, tables=some_rows(weights, {"t_item_id": [3, 4]}))
    scorer.apply(first)
    scorer.load(tiny_bundle)
    assert scorer.version == first.parent
    same_scores(scorer, fresh, 0)
    scorer.apply(first)
    assert scorer.version == first.version


def test_a_delta_that_was_applied_is_ignored(tiny_bundle: Path, weights: State) -> None:
    scorer = loaded(tiny_bundle)
    one, two = (delta(tiny_bundle, n, tables=some_rows(weights, {"t_item_id": [3]}, n)) for n in (1, 2))
    scorer.apply(one)
    scorer.apply(two)
    before = [scorer.score(r).tasks["liked"] for r in REQUESTS]
    scorer.apply(one)
    scorer.apply(two)
    assert scorer.version == two.version
    assert all(np.array_equal(a, scorer.score(r).tasks["liked"]) for a, r in zip(before, REQUESTS, strict=True))


def test_the_first_of_a_newer_chain_begins_from_the_bundles_own_weights(
    tiny_bundle: Path, weights: State, rewrite: Rewrite
) -> None:
    """What the chain that was left had changed must not stay under the new one."""
    scorer = loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, tables=some_rows(weights, {"t_item_id": [3, 4, 5], "t_user_id": [1]})))
    rows = some_rows(weights, {"t_item_id": [9]})
    newer = delta(tiny_bundle, epoch=4, tables=rows)
    scorer.apply(newer)
    assert scorer.version == newer.version == f"{newer.base}+4.1"
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, rows))))


def test_a_newer_chain_whose_bundle_is_gone_is_a_gap(tiny_bundle: Path, weights: State, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "model")
    scorer = loaded(tmp_path / "model")
    scorer.apply(delta(tiny_bundle, tables=some_rows(weights, {"t_item_id": [3]})))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(DeltaGap, match="its bundle cannot be read"):
        scorer.apply(delta(tiny_bundle, epoch=1))
    assert scorer.version.endswith("+0.1")


def test_several_deltas_merged_into_one_are_applied_on_any_of_what_they_hold(
    tiny_bundle: Path, weights: State, rewrite: Rewrite
) -> None:
    """Deltas 2 and 3 in one: on 1 and on 2, where a part of it is in; on the bundle itself delta 1 is missing."""
    parts = [some_rows(weights, {"t_item_id": [n, 10 + n]}, n) for n in (1, 2, 3)]
    both = {"t_item_id": TableRows(*_united(parts[1]["t_item_id"], parts[2]["t_item_id"]))}
    merged = delta(tiny_bundle, 3, follows=1, tables=both)
    every = {"t_item_id": TableRows(*_united(parts[0]["t_item_id"], both["t_item_id"]))}
    wanted = loaded(rewrite(tiny_bundle, written(weights, every)))
    for before in (1, 2):
        scorer = loaded(tiny_bundle)
        for n in range(1, before + 1):
            scorer.apply(delta(tiny_bundle, n, tables=parts[n - 1]))
        scorer.apply(merged)
        assert scorer.version == merged.version
        same_scores(scorer, wanted)
    with pytest.raises(DeltaGap, match=r"follows \w+\+0\.1"):
        loaded(tiny_bundle).apply(merged)


def test_the_encoders_part_of_a_delta_is_passed_over(tiny_bundle: Path, weights: State) -> None:
    part = drawn(weights["embedding.weights.t_item_id"], [3])
    scorer, plain = loaded(tiny_bundle), loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, tables={"retrieval:t_item_id": part}, dense={"retrieval.x": torch.ones(1)}))
    assert scorer.version.endswith("+0.1")
    same_scores(scorer, plain, 0)


def test_a_mapped_bundles_file_is_not_written_to(
    tiny_bundle: Path, weights: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tables are mapped from the file. A page that is written to becomes this scorer's own."""
    monkeypatch.setattr(resident, "RESIDENT", 0)
    before = sha256(tiny_bundle / "model.safetensors")
    scorer, other = loaded(tiny_bundle), loaded(tiny_bundle)
    scores = [other.score(r).tasks["liked"] for r in REQUESTS]
    with Path("/proc/self/maps").open() as maps:
        assert any(line.rstrip().endswith(f"{tiny_bundle}/model.safetensors") for line in maps)
    rows = some_rows(weights, {name: list(range(20)) for name in ("t_item_id", "t_user_id")})
    scorer.apply(delta(tiny_bundle, tables=rows))
    assert not np.allclose(scorer.score(REQUESTS[0]).tasks["liked"], scores[0], atol=1e-4)
    assert sha256(tiny_bundle / "model.safetensors") == before
    assert all(np.array_equal(a, other.score(r).tasks["liked"]) for a, r in zip(scores, REQUESTS, strict=True))


def test_rows_are_written_a_few_at_a_time(
    tiny_bundle: Path, weights: State, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "CHUNK", 7)
    rows = some_rows(weights, {"t_item_id": list(range(31)), "t_user_id": [2, 3, 5, 8, 13, 21, 34, 40]})
    scorer = loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, tables=rows))
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, rows))))
    assert [len(range(*s.indices(100))) for s in apply.chunks(16)] == [7, 7, 2]


# --------------------------------------------------------------------------------------------- what it refuses
def refused(tiny_bundle: Path, weights: State) -> list[Any]:
    item = weights["embedding.weights.t_item_id"]
    layer = next(n for n, t in weights.items() if n.startswith("ranker.") and t.ndim == 2)
    good = drawn(item, [3, 4])
    nan = TableRows(good.rows, np.where([[True], [False]], good.values, np.float32(np.nan)))

    def table(part: TableRows, name: str = "t_item_id") -> dict[str, Any]:
        return {"tables": {name: part}}

    def values(values: Any) -> dict[str, Any]:
        return table(TableRows(good.rows, values))

    def rows(*numbers: int, dtype: Any = np.int64) -> dict[str, Any]:
        return table(TableRows(np.array(numbers, dtype), good.values))

    bad, drowning = torch.full_like(weights[layer], torch.inf), torch.full_like(weights[layer], 3e38)
    return [
        ("another model", BundleError, "is of model 'other'", {"model": "other"}),
        ("another base", DeltaGap, "grew from bundle 0123", {"base": "0123456789ab"}),
        ("no sequence", BundleError, "sequences begin at 1", {"sequence": 0}),
        ("a step left out", DeltaGap, r"follows .*\+1\.2; .*\+1\.1 scores", {"sequence": 3}),
        ("a chain that was left", DeltaGap, "chain that was left", {"epoch": 0, "sequence": 2}),
        ("the middle of a newer chain", DeltaGap, "load the bundle", {"epoch": 2, "sequence": 2}),
        ("no such table", BundleError, "'t_shoe': the model has no such table", table(good, "t_shoe")),
        ("wrong width", BundleError, r"wanted int64 \[n\] with \[n, 8\]", values(good.values[:, :7])),
        ("fewer values than rows", BundleError, "wanted int64", values(good.values[:1])),
        ("float64", BundleError, "values are float64", values(good.values.astype(np.float64))),
        ("rows of int32", BundleError, "rows int32", rows(3, 4, dtype=np.int32)),
        ("a row beyond the table", BundleError, "below 31", rows(3, 31)),
        ("a row below it", BundleError, "below 31", rows(-1, 3)),
        ("a row twice", BundleError, "distinct", rows(3, 3)),
        ("rows in disorder", BundleError, "ascending", rows(4, 3)),
        ("NaN in a row", BundleError, "row 4 is not finite", table(nan)),
        ("an infinite layer", BundleError, "not finite", {"dense": {layer: bad}}),
        ("a layer of another shape", BundleError, "the model's torch.float32", {"dense": {layer: bad[:1]}}),
        ("a layer of another type", BundleError, "torch.float64", {"dense": {layer: weights[layer].double()}}),
        ("a layer that is not there", BundleError, "not of the dense part", {"dense": {"ranker.no": bad}}),
        ("a table as dense", BundleError, "not of the dense part", {"dense": {"embedding.weights.t_item_id": item}}),
        ("a layer that drowns the rest", BundleError, "warm-up call failed", {"dense": {layer: drowning}}),
    ]  # fmt: skip


def test_what_does_not_follow_or_fit_changes_nothing(tiny_bundle: Path, weights: State) -> None:
    scorer = loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, epoch=1, tables=some_rows(weights, {"t_user_id": [3]})))
    version, before = scorer.version, [scorer.score(r).tasks["liked"] for r in REQUESTS]
    good = some_rows(weights, {"t_user_id": [7], "t_item_id": [3]}, seed=5)
    for name, kind, message, changes in refused(tiny_bundle, weights):
        wrong = {"epoch": 1, "sequence": 2, **changes}
        wrong["tables"] = {"t_user_id": good["t_user_id"], **wrong.get("tables", {"t_item_id": good["t_item_id"]})}
        with pytest.raises(kind, match=message) as raised:
            scorer.apply(delta(tiny_bundle, **wrong))
        assert (kind is DeltaGap) == isinstance(raised.value, DeltaGap), name
        assert scorer.version == version, name
        after = [scorer.score(r).tasks["liked"] for r in REQUESTS]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), name
    scorer.apply(delta(tiny_bundle, 2, epoch=1, tables=good))
    assert scorer.version.endswith("+1.2")


# ------------------------------------------------------------------------------------------------ while it scores
def constant(weights: State, step: int) -> State:
    """A dense part whose score tells its step, and a mixture of two that it is one: the last layer's bias says
    `step`, and a hidden unit that is always 1 adds as much again; a half of either step would add up to an odd sum."""
    zeros = {n: torch.zeros_like(t) for n, t in weights.items() if n.startswith("ranker.")}
    layers = sorted(n for n in zeros if n.endswith("weight"))
    first, last = layers[0], layers[-1]
    zeros[first.replace("weight", "bias")][0] = 1.0
    zeros[last][0, 0] = step / 100
    zeros[last.replace("weight", "bias")][0] = step / 100
    return zeros


def test_two_hundred_deltas_under_a_reader_are_never_seen_by_halves(
    tiny_bundle: Path, weights: State, plugins: Any
) -> None:
    """Each answer's score must be that of the version it names: the dense part and the version swap as one."""
    from engine.bundle import Bundle

    steps = 200
    calibration = Bundle.open(tiny_bundle).calibration["liked"]
    wanted = {
        delta(tiny_bundle, n).version: calibration.apply(torch.tensor([2 * n / 100]))[0] for n in range(1, steps + 1)
    }
    scorer = loaded(tiny_bundle)
    scorer.apply(delta(tiny_bundle, 1, dense=constant(weights, 1)))
    faults: list[Any] = []
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for request in REQUESTS[:4]:
                try:
                    scores: Scores = scorer.score(request)
                    found = scores.tasks["liked"]
                    seen.add(scores.version)
                    if not np.allclose(found, wanted[scores.version], atol=1e-6):
                        faults.append((scores.version, found, wanted[scores.version]))
                except Exception as error:
                    faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(2, steps + 1):
        rows = some_rows(weights, {"t_item_id": [n % 31], "t_user_id": [3, 7], "t_genres": [n % 4]}, n)
        scorer.apply(delta(tiny_bundle, n, tables=rows, dense=constant(weights, n)))
    done.set()
    for reader in readers:
        reader.join()
    assert not faults, faults[:3]
    assert len(seen) > 10
    assert scorer.version == delta(tiny_bundle, steps).version


def test_after_deltas_under_readers_nothing_of_the_old_rows_is_left(
    tiny_bundle: Path, weights: State, rewrite: Rewrite
) -> None:
    """Readers enter vectors of users whose rows are just being written; the next answers must not find them."""
    scorer, done, errors = loaded(tiny_bundle), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            for request in REQUESTS:
                try:
                    assert np.isfinite(scorer.score(request).tasks["liked"]).all()
                except Exception as error:
                    errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    every = {"t_item_id": list(range(31)), "t_user_id": list(range(41)), "t_genres": [0, 1, 2, 3]}
    for n in range(1, 101):
        rows = some_rows(weights, every, n)
        scorer.apply(delta(tiny_bundle, n, tables=rows))
    done.set()
    reader.join()
    assert not errors, errors[:3]
    same_scores(scorer, loaded(rewrite(tiny_bundle, written(weights, rows))))


def test_before_a_bundle_is_loaded_there_is_no_version(tiny_bundle: Path) -> None:
    from engine.errors import PlexrankError

    with pytest.raises(PlexrankError, match="no bundle is loaded"):
        InprocScorer(InprocScorer.Options()).apply(delta(tiny_bundle))
