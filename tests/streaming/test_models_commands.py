"""`plexrank models`: what is printed, and what it does to the pointer."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from engine.cli import build
from engine.errors import BundleError
from engine.streaming.deltas.registry import ModelRegistry
from tests.streaming.small_bundles import A, B, C, write_small


@pytest.fixture
def registry(tmp_path) -> ModelRegistry:
    registry = ModelRegistry(tmp_path / "models")
    for n, version in enumerate((A, B)):
        path = write_small(tmp_path / version, version, weight=n, created=f"2025-01-0{n + 1}", parent=A if n else None)
        registry.publish(path, n + 1, "learned")
    return registry


@pytest.fixture
def run(registry):
    def run(*arguments: object) -> str:
        words = ["models", *map(str, arguments), "--models", str(registry.root)]
        result = CliRunner().invoke(build(words), words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_list_prints_each_version_with_its_figures_and_what_is_served(run):
    text = run("list")
    assert "films: 2 versions" in text
    line = next(line for line in text.splitlines() if line.strip().startswith(B))
    assert line.split() == [B, "2025-01-02", A, "0.7", "0.5", "current"]
    assert f"{B} is served since epoch 2: learned" in text


def test_list_as_json_has_the_pointer_and_all_versions(run):
    found = json.loads(run("list", "--json"))
    assert found["model"] == "films"
    assert (found["current"]["version"], found["current"]["epoch"]) == (B, 2)
    assert [(v["version"], v["current"], v["auc"]) for v in found["versions"]] == [(A, False, 0.7), (B, True, 0.7)]


def test_rollback_goes_back_and_says_so(run, registry):
    assert run("rollback", "--reason", "clicks fell") == f"films {A} is served from epoch 3 on\n"
    assert registry.current().reason == "clicks fell"
    with pytest.raises(BundleError, match="nothing to go back to"):
        run("rollback")


def test_promote_takes_a_version_or_the_folder_of_a_bundle(run, registry, tmp_path):
    assert json.loads(run("promote", A, "--pin", "--json"))["pinned"] is True
    assert "pinned" in run("list")
    new = write_small(tmp_path / "trained", C)
    assert run("promote", new) == f"films {C} is served from epoch 4 on\n"
    assert registry.current().history == [B, A]
    assert run("rollback", "--to", B).startswith(f"films {B} ")


def test_pin_holds_the_current_version_until_unpin(run, registry, tmp_path):
    assert run("pin", "--reason", "an audit") == f"films {B} is served from epoch 3 on, pinned\n"
    assert (registry.current().pinned, registry.current().reason) == (True, "an audit")
    with pytest.raises(BundleError, match="pinned"):
        registry.publish(write_small(tmp_path / "trained", C), 3, "learned")
    free = json.loads(run("unpin", "--json"))
    assert (free["version"], free["epoch"], free["pinned"]) == (B, 3, False)
    assert free["reason"] == "unpinned by hand"
    assert registry.publish(tmp_path / "trained", 3, "learned").version == C


def test_a_first_bundle_makes_the_registry(tmp_path):
    new = write_small(tmp_path / "trained", C)
    words = ["models", "promote", str(new), "--models", str(tmp_path / "new")]
    assert CliRunner().invoke(build(words), words, catch_exceptions=False).stdout.startswith(f"films {C} is served")


def test_diff_compares_versions_by_name(run):
    assert "differ" in run("diff", A, "current")
    assert json.loads(run("diff", A, B, "--json"))["tensors"] == {"model.safetensors:weight": {"max_abs": 1.0}}
    with pytest.raises(BundleError, match="no version"):
        run("diff", A, "../x")
