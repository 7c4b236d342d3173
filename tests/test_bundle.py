"""Bundles: what is written is what scores, anywhere; what is refused is refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from engine.bundle import Bundle, diff, read_manifest, show, verify, write_bundle
from engine.bundle.diff import flat
from engine.components import ScoreRequest
from engine.errors import BundleError
from engine.loading import load_config
from engine.model import build_model
from engine.training.calibration import Calibration


@pytest.fixture(scope="module")
def world(films, film_data, plugins):
    """What a training hands over: a frozen model (here with its first weights) and a fitted calibration."""
    config = films.config()
    model = build_model(config, film_data.statistics, plugins, frozen=True)
    rng = np.random.default_rng(5)
    x = rng.normal(0, 2, 400)
    calibration = {"liked": Calibration.fit(x, rng.random(400) < 1 / (1 + np.exp(-x / 2)), "isotonic")}
    return {
        "config": config,
        "model": model,
        "prepared": film_data,
        "calibration": calibration,
        "metrics": {"auc": 0.71, "gauc": None, "history": [{"epoch": 1, "loss": np.float32(0.5)}]},
        "plugins": plugins,
    }


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("b") / "bundle", **world)


REQUEST = ScoreRequest(
    user={"user_id": "u3"}, history={"history": ["4", "7", "0"]}, items=[*map(str, range(30)), "never-seen"]
)


def scores(bundle: Bundle, plugins) -> np.ndarray:
    batch = bundle.encoder.encode_request(REQUEST, bundle.catalogue)
    with torch.inference_mode():
        return bundle.calibration["liked"].apply(bundle.model(plugins)(batch)["liked"])


def test_a_bundle_that_was_copied_scores_as_the_model_that_was_written(world, written, plugins, tmp_path):
    shutil.copytree(written.path, tmp_path / "elsewhere")
    batch = world["prepared"].encoder.encode_request(REQUEST, world["prepared"].catalogue)
    expected = world["calibration"]["liked"].apply(world["model"](batch)["liked"])
    found = scores(Bundle.open(tmp_path / "elsewhere"), plugins)
    assert found.dtype == np.float32
    assert np.ptp(found) > 1e-4  # scores that differ, or the next line says nothing
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_a_bundle_needs_neither_the_data_nor_the_cache(world, written, films, plugins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLEXRANK_CACHE", str(tmp_path / "empty"))
    shutil.copytree(written.path, tmp_path / "b")
    moved = films.folder.with_name("moved-away")
    films.folder.rename(moved)
    try:
        assert len(scores(Bundle.open(tmp_path / "b"), plugins)) == 31
    finally:
        moved.rename(films.folder)


def test_whoever_may_read_one_file_of_a_bundle_may_read_all(written):
    assert len({path.stat().st_mode for path in written.path.rglob("*") if path.is_file()}) == 1


def test_the_manifest_says_what_the_model_is(written):
    manifest = read_manifest(written.path)
    assert manifest.name == "films"
    assert manifest.seed == 1
    assert {(p.kind, p.name) for p in manifest.plugins} >= {
        ("embeddings", "full"),
        ("interests", "mean"),
        ("rankers", "mlp"),
    }
    assert {p.distribution for p in manifest.plugins} == {"plexrank"}
    assert manifest.libraries["torch"] == torch.__version__
    assert manifest.metrics["history"] == [{"epoch": 1, "loss": 0.5}]
    assert load_config(written.path / "config.yaml") == written.config
    assert set(manifest.files) >= {"model.safetensors", "config.yaml", "users.arrow", "catalogue/items.arrow"}


def test_equal_contents_have_equal_versions_and_other_weights_another(world, written, plugins, tmp_path):
    again = write_bundle(tmp_path / "again", **world)
    assert again.version == written.version
    assert read_manifest(again.path).created >= written.manifest.created
    other = build_model(world["config"].model_copy(update={"seed": 2}), world["prepared"].statistics, plugins).freeze()
    changed = write_bundle(tmp_path / "other", **(world | {"model": other, "parent": written.version}))
    assert changed.version != written.version
    assert changed.manifest.parent == written.version


def test_large_files_are_mapped_small_ones_read_and_both_score_the_same(written, plugins, monkeypatch):
    read = scores(Bundle.open(written.path), plugins)
    assert not _mapped_ranges(written.path / "model.safetensors"), "nobody else of this module holds it"
    monkeypatch.setattr("engine.resident.RESIDENT", 0)
    bundle = Bundle.open(written.path)
    held = {n: t for n, t in bundle.model(plugins).state_dict().items() if t.numel()}
    assert held
    assert not any(t.is_meta or t.requires_grad for t in held.values())
    mapped = _mapped_ranges(written.path / "model.safetensors")
    assert all(any(a <= t.data_ptr() < b for a, b in mapped) for t in held.values())
    assert np.array_equal(scores(bundle, plugins), read)


def _mapped_ranges(path) -> list[tuple[int, int]]:
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file if line.rstrip().endswith(str(path))]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def test_what_data_knew_comes_back(world, written, film_data):
    np.testing.assert_array_equal(written.item_counts, film_data.item_counts)
    np.testing.assert_array_equal(written.item_latest, film_data.item_latest)
    for space, statistics in film_data.statistics.items():
        np.testing.assert_array_equal(written.statistics[space].fingerprints, statistics.fingerprints)
        np.testing.assert_array_equal(written.statistics[space].counts, statistics.counts)
    assert written.catalogue.title(3) == film_data.catalogue.title(3)
    assert list(written.users()) == list(film_data.users())
    assert written.item_vectors is None


def test_without_users_none_are_kept(world, tmp_path):
    bundle = write_bundle(tmp_path / "b", **world, with_users=False)
    assert list(bundle.users()) == []
    assert "users.arrow" not in bundle.manifest.files


def test_an_existing_path_is_refused(world, written, tmp_path):
    with pytest.raises(BundleError, match="exists; choose another folder"):
        write_bundle(written.path, **world)
    (tmp_path / "mine").mkdir()
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write_bundle(tmp_path / "mine", **world, replace=True)


def test_a_bundle_makes_way_for_a_new_one_if_asked(world, plugins, tmp_path):
    old = write_bundle(tmp_path / "b", **world)
    mapped = old.model(plugins)
    before = {n: t.clone() for n, t in mapped.state_dict().items()}
    other = build_model(world["config"].model_copy(update={"seed": 9}), world["prepared"].statistics, plugins).freeze()
    new = write_bundle(tmp_path / "b", **(world | {"model": other}), replace=True)
    assert read_manifest(tmp_path / "b").version == new.version != old.version
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    for name, tensor in mapped.state_dict().items():  # who serves the old one goes on
        assert torch.equal(tensor, before[name])


def test_numbers_that_are_not_finite_are_never_written(world, plugins, tmp_path):
    broken = build_model(world["config"], world["prepared"].statistics, plugins).freeze()
    name, tensor = next((n, t) for n, t in broken.state_dict().items() if t.is_floating_point() and t.numel())
    tensor.view(-1)[0] = float("nan")
    with pytest.raises(BundleError, match=f"not finite: {name}") as error:
        write_bundle(tmp_path / "b", **(world | {"model": broken}))
    assert "clip_norm" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_verify_of_a_whole_bundle_also_checks_it_against_the_plugins(written, plugins):
    result = verify(written.path, plugins)
    assert result.ok
    assert result.version == written.version
    assert result.files == len(written.manifest.files)
    assert result.warnings == []
    assert json.dumps(result.as_dict())


def test_show_lists_tensors_and_sizes_without_reading_them(written):
    shown = show(written.path)
    assert shown["name"] == "films"
    assert shown["bytes"] == sum(p.stat().st_size for p in written.path.rglob("*.*") if p.name != "manifest.json")
    assert shown["items"] == 30
    assert any(t["name"].startswith("ranker.") for t in shown["tensors"])
    assert shown["calibration"]["liked"]["kind"] == "isotonic"
    assert json.dumps(shown)


def test_diff_of_a_bundle_with_itself_is_empty(written):
    found = diff(written.path, written.path)
    assert found["same"]
    assert not any(found[k] for k in ("config", "features", "plugins", "libraries", "metrics", "files", "tensors"))


def test_diff_names_what_changed_and_by_how_much(world, written, plugins, films, tmp_path):
    config = films.config(training={"epochs": 5, "batch_size": 128, "threads": 1})
    model = build_model(config, world["prepared"].statistics, plugins).freeze()
    name = next(n for n, t in model.state_dict().items() if n.startswith("ranker.") and t.is_floating_point())
    model.load_state_dict(world["model"].state_dict())
    model.state_dict()[name].view(-1)[0] += 0.5
    changes = {"config": config, "model": model, "metrics": {"auc": 0.75}}
    other = write_bundle(tmp_path / "b", **(world | changes))
    found = diff(written.path, other.path)
    assert not found["same"]
    assert found["config"] == {"training.epochs": [2, 5]}
    assert found["metrics"]["auc"] == [0.71, 0.75]
    assert list(found["tensors"]) == [f"model.safetensors:{name}"]
    assert found["tensors"][f"model.safetensors:{name}"]["max_abs"] == pytest.approx(0.5, abs=1e-6)
    assert "model.safetensors" in found["files"]


def test_flat_keys_are_dotted_and_empty_things_stay():
    assert flat({"a": {"b": [1, {"c": 2}]}, "d": {}}) == {"a.b.0": 1, "a.b.1.c": 2, "d": {}}


def test_no_load_path_can_run_a_pickle():
    """The engine's sources name neither pickle nor torch.load nor anything built on them."""
    import ast
    from pathlib import Path

    import engine

    for path in Path(engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "joblib", "cloudpickle", "dill", "shelve"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, path
