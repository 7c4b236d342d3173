"""What a learner gives out where few events come, or where the guard holds it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config_learning import GuardConfig
from engine.plugins import Plugins
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.guard import Guard
from engine.streaming.learning.learner import Learner
from tests.streaming.film_learner import configured
from tests.streaming.film_stream import visits
from tests.streaming.memory_log import MemoryLog

QUIET = {"logloss_ratio": None, "auc_drop": None, "calibration": None}
WILD = {"embedding_lr": 50.0, "dense_lr": 0.5, "guard": {"window": 500, "minimum": 200, "rollback": False}}


def learner(log: MemoryLog, folder: Path, plugins: Plugins, bundle: Path, **learning: Any) -> Learner:
    config = configured(bundle, **learning)
    registry = ModelRegistry(folder / "models", config.name)
    return Learner(config, log, folder / "out", plugins=plugins, bundle=bundle, registry=registry)


def test_the_version_to_go_back_to_is_not_removed_though_many_bundles_came_since(
    plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Nothing proves itself in 2,000 examples here, so that the first bundle is the last good one."""
    log = MemoryLog()
    visits(150).write(log)
    often = {"interval_seconds": 1000, "bundle_seconds": 1e-9, "keep": 2}
    learning = learner(log, tmp_path, plugins, tiny_bundle, publish=often, guard=QUIET)
    first = learning.bundle.version
    assert learning.run("end")["bundles"] > 8
    assert learning.judge.guard.good == first
    registry = ModelRegistry(tmp_path / "models", learning.bundle.name)
    there = {v.version for v in registry.versions()}
    assert there >= learning.judge.guard.needed
    assert len(there) <= 6, "the newest two, the served one, that before it, the good one, and one that may become it"
    learning.close()


def test_a_guard_names_the_good_version_and_the_next_that_may_prove_itself() -> None:
    guard = Guard(GuardConfig(), begun_with="v0")
    for number in range(1, 300):
        guard.published(f"v{number}", 10 * number)
        assert guard.needed == {"v0", "v1"}
    guard.removed(["v1", "v2"])
    assert guard.needed == {"v0", "v201"}, "98 of the newest are known"


def test_a_bundle_is_not_written_where_nothing_was_learnt_since_the_last(
    plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(100).write(log)
    learning = learner(log, tmp_path, plugins, tiny_bundle, guard=QUIET)
    version = (learning.run("end")["version"], learning.run("end")["version"])
    learning.close()
    assert version[0] == version[1]
    assert learning.counts["bundles"] == 1


def test_a_learner_that_is_held_back_judges_at_its_interval_alone(
    plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """However many rows wait: a judgement looks at the whole window, and a step at one batch."""
    log = MemoryLog()
    visits(400).write(log)
    rarely = {"interval_seconds": 1000, "rows": 1}
    learning = learner(log, tmp_path, plugins, tiny_bundle, publish=rarely, **WILD)
    summary = learning.run("end")
    learning.close()
    assert not learning.judge.verdict().ok
    assert summary["steps"] > 20
    assert summary["held"] <= 3


def test_a_pinned_version_stays_though_the_guard_would_go_back(
    plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(400).write(log)
    wild = {**WILD, "guard": {**WILD["guard"], "rollback": True}}
    learning = learner(log, tmp_path, plugins, tiny_bundle, publish={"interval_seconds": 0.001}, **wild)
    pinned = ModelRegistry(tmp_path / "models", learning.bundle.name).pin(reason="an audit")
    summary = learning.run("end")
    learning.close()
    assert summary["rollbacks"] >= 1
    now = ModelRegistry(tmp_path / "models", learning.bundle.name).current()
    assert now is not None
    assert (now.version, now.pinned) == (pinned.version, True)
    assert now.epoch > pinned.epoch, "it began anew from the pinned bundle"
    assert now.reason.startswith("guard: ")
    assert summary["bundles"] == 0


def test_a_learner_that_is_held_back_goes_on_from_what_somebody_promotes(
    plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(400).write(log)
    learning = learner(log, tmp_path, plugins, tiny_bundle, publish={"interval_seconds": 0.001}, **WILD)
    learning.run("end")
    assert learning.judge.guard.stopped
    registry = ModelRegistry(tmp_path / "models", learning.bundle.name)
    current = registry.current()
    assert current is not None
    registry.promote(current.version, reason="without what the learner made of it")
    visits(20, seed=6).write(log)
    learning.run("end")
    learning.close()
    assert learning.giving is not None
    assert learning.giving.chain.epoch > current.epoch
