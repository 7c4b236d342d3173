"""What a learner publishes is what it learnt: deltas on the bundle give its weights, also after a crash."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, standing
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.learner import Learner
from tests.streaming.film_learner import PUBLISHING, changed, configured
from tests.streaming.film_stream import visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="session")
def config(tiny_bundle: Path) -> Config:
    return configured(tiny_bundle, checkpoint_events=200, **PUBLISHING)


def learner(config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path | None, models: Path) -> Learner:
    return Learner(config, log, out, plugins=plugins, bundle=bundle, registry=ModelRegistry(models, config.name))


def deltas(log: MemoryLog) -> list[Delta]:
    assembler = Assembler()
    found = [assembler.add(record.value) for record in log.sibling("deltas", partitions=1).records]
    return [delta for delta in found if delta is not None]


def put(state: dict[str, torch.Tensor], delta: Delta) -> None:
    """A delta's ranking part on a frozen model's tensors."""
    for name, part in delta.tables.items():
        if not name.startswith("retrieval:"):
            state[f"embedding.weights.{name}"][torch.from_numpy(part.rows)] = torch.from_numpy(part.values)
    state.update({n: t for n, t in delta.dense.items() if not n.startswith(("retrieval.", "calibration."))})


def calibrations(chain: Sequence[Delta]) -> dict[str, torch.Tensor]:
    """What a follower calibrates with in the end, by its names in a bundle; nothing where it keeps the bundle's."""
    dense = {name: value for delta in chain for name, value in delta.dense.items()}
    start = "calibration."
    return {name.removeprefix(start): value for name, value in dense.items() if name.startswith(start)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_the_deltas_on_the_first_bundle_are_the_last_one(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(400).write(log)
    learning = learner(config, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    begun = learning.bundle.version
    summary = learning.run("end")
    learning.close()
    assert summary["published"] > 5
    assert summary["bundles"] == 1
    state = {n: v.clone() for n, v in Bundle.open(tiny_bundle).frozen_tensors().items()}
    chain = deltas(log)
    assert [d.sequence for d in chain] == list(range(1, len(chain) + 1))
    assert {d.base for d in chain} == {begun}
    assert any(d.vectors is not None for d in chain)
    for delta in chain:
        put(state, delta)
    registry = ModelRegistry(tmp_path / "models", config.name)
    pointer = registry.current()
    assert pointer is not None
    last = Bundle.open(registry.bundle(pointer.version))
    assert last.manifest.parent == begun
    same(state, last.frozen_tensors())
    assert chain[-1].newest == summary["newest"]
    assert chain[-1].positions == {0: log.ends()[0]}


def test_the_calibration_that_followed_the_stream_is_in_the_deltas_and_in_the_bundle(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Also after a return: whoever applied the deltas calibrates as the learner does, and as its bundle does."""
    log = MemoryLog()
    visits(700).write(log)
    for turn in ("whole", "again"):
        learning = learner(config, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
        learning.run("end")
        learning.close()
        now = learning.model.calibration.now["liked"]
        assert now.kind == "platt", turn
        last = learning.bundle
        same(last.calibration["liked"].to_tensors(), now.to_tensors())
        same({n.removeprefix("liked."): t for n, t in calibrations(deltas(log)).items()}, now.to_tensors())
        visits(300, seed=6).write(log)
    assert Bundle.open(tiny_bundle).calibration["liked"].kind == "isotonic"


def test_without_calibration_there_is_none_to_follow(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """`training.calibration: none`: the bundle's own stays."""
    log = MemoryLog()
    visits(700).write(log)
    whole = config.model_dump(mode="json")
    none = Config.model_validate({**whole, "training": {**whole["training"], "calibration": "none"}})
    learning = learner(none, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    learning.run("end")
    learning.close()
    assert calibrations(deltas(log)) == {}
    begun = Bundle.open(tiny_bundle).calibration["liked"]
    same(learning.bundle.calibration["liked"].to_tensors(), begun.to_tensors())


def test_a_learner_that_comes_back_goes_on_with_the_chain_of_its_followers(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """It fell behind its last checkpoint, having published more: what it sends then is numbered behind that, can be
    applied by all, and gives every follower its weights."""
    log = MemoryLog()
    visits(400).write(log)
    one = learner(config, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    one._finish = lambda drained: None  # type: ignore[method-assign]  as after kill -9
    turns = 0
    take = one._take

    def counting(chunk: Any, live: bool) -> None:
        nonlocal turns
        take(chunk, live)
        turns += 1
        if turns == 10:
            one.stop()

    one._take = counting  # type: ignore[method-assign]
    one.run("end")
    one.close()
    before = deltas(log)
    two = learner(config, log, tmp_path / "out", plugins, None, tmp_path / "models")
    assert two.trainer.steps < one.trainer.steps, "the checkpoint is older than what was published"
    two.giving.bundle = lambda *a, **k: False  # type: ignore
    two.run("end")
    two.close()
    every = deltas(log)
    new = every[len(before) :]
    assert new[0].sequence == before[-1].sequence + 1
    assert standing(new[0], before[-1].version) == "next"
    state = {n: v.clone() for n, v in Bundle.open(tiny_bundle).frozen_tensors().items()}
    version = before[0].base
    for delta in every:
        assert standing(delta, version) == "next"
        put(state, delta)
        version = delta.version
    same(state, dict(two.trainer.frozen().state_dict()))


def test_a_model_that_gets_worse_is_held_back_and_rolled_back(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Clicks turn into their opposite for a learner with absurd rates: publishing stops, the registry says why."""
    log = MemoryLog()
    visits(800).write(log)
    guard = {"window": 500, "minimum": 200, "logloss_ratio": 1.05}
    wild = changed(config, embedding_lr=1000.0, dense_lr=5.0, guard=guard)
    learning = learner(wild, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    begun = learning.bundle.version
    summary = learning.run("end")
    learning.close()
    assert summary["held"] > 0
    assert summary["rollbacks"] >= 1
    pointer = ModelRegistry(tmp_path / "models", config.name).current()
    assert pointer is not None
    assert pointer.version == begun
    assert pointer.reason.startswith("guard: ")
    assert any(not v.ok for v in learning.judge.verdicts)


def test_somebody_elses_promotion_is_what_the_learner_goes_on_from(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    visits(200).write(log)
    learning = learner(config, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    learning.run("end")
    first, second = learning.judge.begun_with, learning.bundle.version
    registry = ModelRegistry(tmp_path / "models", config.name)
    assert second != first
    registry.promote(first, reason="by hand")
    visits(200, seed=6).write(log)
    learning.run("end")
    learning.close()
    assert learning.summary()["bundles"] == 2
    pointer = registry.current()
    assert pointer is not None
    assert Bundle.open(registry.bundle(pointer.version)).manifest.parent == first
    assert second != pointer.version


def test_a_log_that_is_away_loses_nothing(config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path) -> None:
    """The broker stops while the learner is at work, live, and comes back: every event is trained, every delta sent."""
    import threading

    log = MemoryLog()
    stream = visits(300)
    stream.write(log)
    learning = learner(config, log, tmp_path / "out", plugins, tiny_bundle, tmp_path / "models")
    thread = threading.Thread(target=learning.run, args=("live",))
    thread.start()
    try:
        _until(lambda: learning.trainer.steps > 3)
        log.down()
        time.sleep(0.3)
        log.down(False)
        more = visits(300, seed=9)
        more.write(log)
        events = len(stream.events) + len(more.events)
        _until(lambda: learning.stream.counts["events"] == events and not len(learning.stream.ready))
    finally:
        log.down(False)
        learning.stop()
        thread.join()
        learning.close()
    summary = learning.summary()
    assert summary["examples"]["joined"] == summary["examples"]["trained"]
    state = {n: v.clone() for n, v in Bundle.open(tiny_bundle).frozen_tensors().items()}
    for delta in deltas(log):
        put(state, delta)
    same(state, dict(learning.trainer.frozen().state_dict()))


def _until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_a_batch_that_is_not_full_is_trained_after_a_while(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Five clicks in a log that then is silent: 32 would be a batch."""
    import threading

    from tests.streaming.film_stream import BEGIN, click, ranking

    log = MemoryLog()
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
    thread = threading.Thread(target=learning.run, args=("live",))
    thread.start()
    try:
        items = ["1", "2", "3", "4", "5"]
        log.append([("u1", ranking("r", "u1", items, BEGIN))])
        log.append([("u1", click(f"c{i}", "u1", i, "r", BEGIN + 1)) for i in items])
        _until(lambda: learning.counts["trained"] == 5)
    finally:
        learning.stop()
        thread.join()
        learning.close()
    assert learning.trainer.steps >= 1
    assert np.isfinite(learning.newest)
