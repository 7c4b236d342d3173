"""A bundle from before there was a stream: no optimizers' state, no figures of drift, no section `learning`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.bundle import Bundle, verify
from engine.bundle.manifest import sealed
from engine.components import ScoreRequest
from engine.config import Config
from engine.plugins import Plugins
from engine.served import Served
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.learner import Learner
from plugins.scorers.inproc import InprocScorer
from tests.streaming.film_stream import visits
from tests.streaming.memory_log import MemoryLog

SINCE = ("optimizer.safetensors", "drift.safetensors")
SERVING_SINCE = ("log_rankings", "log_items", "forward_bytes", "models")


@pytest.fixture
def older(tiny_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "older"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in SINCE:
        (folder / name).unlink()
        del manifest["files"][name]
    del manifest["config"]["learning"]
    del manifest["config"]["training"]["keep_optimizer"]
    for name in SERVING_SINCE:
        del manifest["config"]["serving"][name]
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest).as_json()))
    return folder


def test_an_older_bundle_opens_serves_and_scores_as_before(older: Path, tiny_bundle: Path, plugins: Plugins) -> None:
    bundle = Bundle.open(older)
    bundle.check_parts()
    assert verify(older, plugins).ok
    assert bundle.optimizer() is None
    assert bundle.drift is None
    assert Served.open(older, None, plugins).tower is not None
    request = ScoreRequest(user={"user_id": "u1"}, history={"item_id": ["4", "7"]}, items=["1", "2", "3"])
    scores = []
    for path in (older, tiny_bundle):
        scorer = InprocScorer(InprocScorer.Options())
        scorer.load(path)
        scores.append(scorer.score(request).tasks["liked"])
    assert np.array_equal(*scores)


def test_an_older_bundle_can_be_learnt_on(older: Path, plugins: Plugins, tmp_path: Path) -> None:
    whole = Bundle.open(older).config.model_dump(mode="json")
    join = {"window_seconds": 20, "lateness_seconds": 5}
    config = Config.model_validate({**whole, "learning": {"join": join, "batch_size": 32, "chunk": 50}})
    log = MemoryLog()
    visits(100).write(log)
    registry = ModelRegistry(tmp_path / "models", config.name)
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=older, registry=registry)
    try:
        assert learning.run("end")["bundles"] == 1
    finally:
        learning.close()
    grown = Bundle.open(registry.bundle("current"))
    assert grown.optimizer() is not None
    assert grown.drift is None, "nothing to compare with came to it"
