"""Numbers that are finite and absurd, from a client or an item's event: nothing that reads them may stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.config import Config
from engine.live_items import LiveItems
from engine.pipeline import Pipeline
from engine.plugins import Plugins
from engine.served import Served
from engine.streaming.learning.learner import Learner
from plugins.scorers.inproc import InprocScorer
from plugins.state.sqlite import SqliteStateStore
from tests.streaming.film_learner import configured
from tests.streaming.film_stream import BEGIN, event, visits
from tests.streaming.memory_log import MemoryLog

ABSURD = [3e38, -3e38, 1e30, 1e300, 1e-300]


@pytest.fixture
def config(tiny_bundle: Path) -> Config:
    return configured(tiny_bundle)


@pytest.fixture
def pipeline(tiny_bundle: Path, plugins: Plugins, tmp_path: Path) -> Iterator[Pipeline]:
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(tiny_bundle)
    store = SqliteStateStore(SqliteStateStore.Options(path=str(tmp_path / "state")), 100)
    made = Pipeline(Served.open(tiny_bundle, None, plugins), scorer, store, plugins)
    yield made
    made.close()
    store.close()


@pytest.mark.parametrize("number", ABSURD)
def test_a_learner_goes_on_after_rankings_with_absurd_numbers(
    number: float, config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """As `POST /v1/rank` logs them: whoever may ask for a ranking could else stop the learner for good."""
    log = MemoryLog()
    stream = visits(60)
    for place, (key, value) in enumerate(stream.events):
        document = msgspec.json.decode(value)
        if document["type"] == "ranking":
            document["data"]["item_features"] = {"year": [number] * len(document["data"]["items"])}
            stream.events[place] = (key, msgspec.json.encode(document))
    stream.write(log)
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
    try:
        summary = learning.run("end")
    finally:
        learning.close()
    assert summary["steps"] > 3
    assert summary["events"]["dead"] == 0
    weights = Bundle.open(tmp_path / "out" / "bundle").frozen_tensors()  # opening refuses what is not finite
    assert weights.keys() == Bundle.open(tiny_bundle).frozen_tensors().keys()


@pytest.mark.parametrize("number", ABSURD)
def test_items_with_absurd_numbers_are_scored(number: float, pipeline: Pipeline) -> None:
    live = LiveItems(pipeline, pipeline.scorer, interval=0.0)
    live.add("absurd", {"genres": ["war"], "year": number}, BEGIN)
    live.add("5", {"year": number}, BEGIN)
    assert live.flush()
    live.close()
    assert live.refused == 0
    request = ScoreRequest(user={}, history={"item_id": ["5", "absurd"]}, items=["absurd", "5", "6"])
    assert np.isfinite(pipeline.scorer.score(request).tasks["liked"]).all()


def test_an_item_event_with_an_absurd_number_stops_no_learner(
    config: Config, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    log.append([("i", event("item", f"i{n}", BEGIN, {"item": str(n), "features": {"year": 3e38}})) for n in range(30)])
    visits(60).write(log)
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
    try:
        assert learning.run("end")["steps"] > 3
    finally:
        learning.close()
