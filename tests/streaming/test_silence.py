"""A stream that falls silent: the last windows end by the clock in live mode, and stay open in a drained log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.learning.learner import Learner
from tests.streaming.film_stream import BEGIN, click, ranking
from tests.streaming.memory_log import MemoryLog

ITEMS = ["1", "2", "3", "4", "5"]


@pytest.fixture
def config(tiny_bundle: Path) -> Config:
    whole = Bundle.open(tiny_bundle, verify=False).config.model_dump(mode="json")
    join = {"window_seconds": 0.5, "lateness_seconds": 0.1, "idle_seconds": 0.2}
    return Config.model_validate({**whole, "learning": {"join": join, "max_delay_seconds": 0.01}})


@pytest.fixture
def log() -> MemoryLog:
    """One ranking of five items, one of them clicked, in the second of two partitions or the first."""
    made = MemoryLog(partitions=2)
    made.append([("u1", ranking("r", "u1", ITEMS, BEGIN)), ("u1", click("c", "u1", "3", "r", BEGIN + 0.1))])
    return made


def live(learning: Learner, then: Callable[[], None]) -> None:
    thread = threading.Thread(target=learning.run, args=("live",))
    thread.start()
    try:
        then()
    finally:
        learning.stop()
        thread.join()
        learning.close()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_the_last_negatives_are_trained_though_nobody_comes_any_more(
    config: Config, log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
    live(learning, lambda: until(lambda: learning.counts["trained"] == 5))
    examples = learning.summary()["examples"]
    assert (examples["positive"], examples["negative"], examples["waiting"]) == (1, 4, 0)
    assert learning.stream.open() == {"interactions": 0, learning.trainer.tasks[0]: 0}


def test_an_event_after_the_silence_is_joined_as_a_late_one(
    config: Config, log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)

    def then() -> None:
        until(lambda: learning.counts["trained"] == 5)
        log.append([("u1", click("late", "u1", "4", "r", BEGIN + 0.4))])
        until(lambda: learning.counts["correction"] == 1)

    live(learning, then)


def test_a_log_that_does_not_answer_is_not_silent(
    config: Config, log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
    moved: list[float] = []
    advance = learning.stream.advance

    def counted(clock: float) -> None:
        if log.world.is_down:
            moved.append(clock)
        else:
            advance(clock)

    learning.stream.advance = counted  # type: ignore[method-assign]

    def then() -> None:
        until(lambda: learning.stream.counts["events"] == 2)
        log.down()
        time.sleep(1.0)
        before = len(moved)
        time.sleep(1.0)
        assert len(moved) == before, "event time goes on while nothing is known of the log"
        log.down(False)
        until(lambda: learning.counts["trained"] == 5)

    live(learning, then)


def test_at_the_end_of_a_drained_log_open_windows_stay_open_and_are_counted(
    config: Config, log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        learning = Learner(config, log, tmp_path / "out", plugins=plugins, bundle=tiny_bundle)
        summary = learning.run("end")
        learning.close()
        time.sleep(0.8)  # a clock would have ended the windows by now
        assert summary["open"][learning.trainer.tasks[0]] == 4
        assert (summary["examples"]["joined"], summary["examples"]["waiting"]) == (1, 1), "the click, in half a batch"
