"""A learner on real brokers: the same counts as on a log in memory, and nothing lost when the broker is killed."""

from __future__ import annotations

import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.learning.audit import RECORD
from engine.streaming.learning.learner import Learner
from plugins.events.kafka import KafkaEventLog
from tests.brokers import Broker
from tests.streaming.film_stream import BEGIN, visits

LEARNING = {
    "join": {"window_seconds": 20, "lateness_seconds": 5, "idle_seconds": 60},
    "batch_size": 32,
    "chunk": 40,
    "checkpoint_events": 150,
}


@pytest.fixture(scope="session")
def config(tiny_bundle: Path) -> Config:
    whole = Bundle.open(tiny_bundle, verify=False).config.model_dump(mode="json")
    return Config.model_validate({**whole, "learning": LEARNING})


def topic(broker: Broker, partitions: int = 2) -> KafkaEventLog:
    options = {**broker.options, "topic": f"films-{uuid.uuid4().hex[:12]}", "partitions": partitions}
    return KafkaEventLog(KafkaEventLog.Options(**options))


def test_a_drained_topic_gives_the_same_bits_however_often_the_learner_is_stopped(
    config: Config, plugins: Plugins, tiny_bundle: Path, tansu: Broker, tmp_path: Path
) -> None:
    log = topic(tansu)
    stream = visits(200)
    stream.write(log)
    told = {}
    for name, stops in (("whole", 0), ("broken", 3)):
        for life in range(stops + 1):
            learner = Learner(config, log, tmp_path / name, plugins=plugins, bundle=tiny_bundle)
            if life < stops:
                _stop_after(learner, 2)
            told[name] = learner.run("end")
            learner.close()
    log.close()
    assert told["whole"]["events"]["in"] == len(stream.events)
    for key in ("events", "join", "examples", "examples_sha256", "steps", "positions"):
        assert told["whole"][key] == told["broken"][key], key
    one, two = (Bundle.open(tmp_path / name / "bundle").manifest.files for name in ("whole", "broken"))
    assert one["model.safetensors"] == two["model.safetensors"]


def _stop_after(learner: Learner, chunks: int) -> None:
    take, left = learner._take, [chunks]

    def counting(chunk: Any, live: bool) -> None:
        take(chunk, live)
        left[0] -= 1
        if left[0] == 0:
            learner.stop()

    learner._take = counting  # type: ignore[method-assign]


def test_a_broker_that_is_killed_and_comes_back_loses_no_event(
    config: Config, plugins: Plugins, tiny_bundle: Path, tansu_s3: Broker, tmp_path: Path
) -> None:
    """kill -9 of the broker under a live learner: it waits, says so, and trains what came before and after once."""
    log = topic(tansu_s3)
    first, second = visits(150), visits(150, seed=9, begin=BEGIN + 155)
    first.write(log)
    audit = tmp_path / "audit"
    learner = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle, audit=audit)
    thread = threading.Thread(target=learner.run, args=("live",))
    thread.start()
    try:
        _until(lambda: learner.trainer.steps > 2)
        tansu_s3.kill()
        time.sleep(1.0)
        assert thread.is_alive()
        tansu_s3.start()
        second.write(log)
        events = len(first.events) + len(second.events)
        _until(lambda: learner.stream.counts["events"] == events and not len(learner.stream.ready))
    finally:
        if tansu_s3.process is not None and tansu_s3.process._process is None:
            tansu_s3.start()
        learner.stop()
        thread.join()
        learner.close()
        log.close()
    summary = learner.summary()
    assert summary["events"]["in"] == sum(n for name, n in summary["events"].items() if name != "in")
    assert summary["join"]["liked.positives"] == len(first.liked) + len(second.liked)
    trained = np.fromfile(audit, RECORD)
    assert len(np.unique(trained[["request", "item"]])) == len(trained) == summary["examples"]["trained"]


def _until(true: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
