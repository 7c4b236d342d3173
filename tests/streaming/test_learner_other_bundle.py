"""A learner whose model is replaced under it, by hand or by its own bundle: its items and its features are the new
bundle's from then on, and it comes back from a crash in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.bundle.grow import write_grown
from engine.config import Config
from engine.data.encoder import FeatureEncoder
from engine.data.numeric import NumericTransforms, Transform
from engine.errors import BundleError
from engine.plugins import Plugins
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.learner import Learner
from tests.streaming.film_learner import PUBLISHING, configured
from tests.streaming.film_stream import BEGIN, event, visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="session")
def config(tiny_bundle: Path) -> Config:
    return configured(tiny_bundle, **PUBLISHING)


def learner(config: Config, log: MemoryLog, folder: Path, plugins: Plugins, bundle: Path) -> Learner:
    registry = ModelRegistry(folder / "models", config.name)
    return Learner(config, log, folder / "out", plugins=plugins, bundle=bundle, registry=registry)


def said(item: str, seconds: float) -> tuple[str, bytes]:
    return (f"i{item}", event("item", f"said-{item}", seconds, {"item": item, "features": {"year": 1990}}))


def with_items(bundle: Path, items: list[str], goal: Path, plugins: Plugins) -> Path:
    """The same model over a catalogue with these items behind the last."""
    base = Bundle.open(bundle)
    catalogue = base.catalogue.updated(items, [{"year": 1999}] * len(items), base.encoder)
    write_grown(
        goal,
        base,
        model=base.model(plugins),
        optimizer=base.optimizer() or {},
        catalogue=catalogue,
        metrics={"auc": 0.5},
        plugins=plugins,
    )
    return goal


def test_the_items_of_a_promoted_bundle_are_in_the_one_that_grows_from_it(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    log.append([said("streamed", BEGIN)])
    visits(100).write(log)
    learning = learner(config, log, tmp_path, plugins, tiny_bundle)
    learning.run("end")
    registry = ModelRegistry(tmp_path / "models", config.name)
    version = registry.take_in(with_items(tiny_bundle, ["new-1", "new-2"], tmp_path / "more", plugins))
    registry.promote(version, reason="trained anew")
    visits(100, seed=6).write(log)
    learning.run("end")
    learning.close()
    current = registry.current()
    assert current is not None
    grown = Bundle.open(registry.bundle(current.version))
    assert grown.manifest.parent == version
    assert (grown.catalogue.rows(["new-1", "new-2", "streamed"]) >= 0).all()
    again = learner(config, log, tmp_path, plugins, tiny_bundle)
    assert again.trainer.steps == learning.trainer.steps, "it goes on from its checkpoint"
    again.close()


def test_a_bundle_that_reads_features_otherwise_is_refused_with_what_to_do(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """What waits for its clicks was encoded as the bundle before reads it: it would teach the other nonsense."""
    log = MemoryLog()
    visits(10).write(log)
    learning = learner(config, log, tmp_path, plugins, tiny_bundle)
    other = Bundle.open(tiny_bundle)
    other.__dict__["encoder"] = FeatureEncoder(other.schema, NumericTransforms({"year": Transform(mean=1.0, std=2.0)}))
    giving = learning.giving
    assert giving is not None
    giving.anew = lambda: other  # type: ignore[method-assign]
    with pytest.raises(BundleError, match="--from"):
        learning.run("end")
    learning.close()


def test_a_learner_killed_between_its_bundle_and_its_checkpoint_comes_back_though_items_came(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The bundle holds an item that the newest checkpoint has not heard of yet."""
    log = MemoryLog()
    visits(100).write(log)
    first = learner(config, log, tmp_path, plugins, tiny_bundle)
    first.run("end")
    first.close()
    log.append([said("late", BEGIN + 200)])
    visits(100, seed=6).write(log)
    killed = learner(config, log, tmp_path, plugins, tiny_bundle)
    killed.save = lambda: None  # type: ignore[method-assign,return-value]
    killed.run("end")
    killed.close()
    assert killed.counts["bundles"] > first.counts["bundles"]
    back: Any = learner(config, log, tmp_path, plugins, tiny_bundle)
    assert back.bundle.version == killed.bundle.version
    back.run("end")
    back.close()
    assert back.trainer.steps == killed.trainer.steps
    assert (back.bundle.catalogue.rows(["late"]) >= 0).all()
