"""One digest for all joined examples: it tells two replays apart exactly where their examples differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.learning.learner import Learner
from tests.streaming.film_stream import Stream, visits
from tests.streaming.memory_log import MemoryLog


@pytest.fixture(scope="module")
def log() -> MemoryLog:
    log = MemoryLog()
    visits(150).write(log)
    return log


def replay(log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, **changes: Any) -> dict[str, Any]:
    learner = _learner(log, out, plugins, bundle, **changes)
    try:
        return learner.run("end")
    finally:
        learner.close()


def _learner(log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, **changes: Any) -> Learner:
    whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json")
    join = {"window_seconds": 20, "lateness_seconds": 5, "negatives": 0.5, **changes.pop("join", {})}
    learning = {"join": join, "chunk": 50, "checkpoint_events": 100_000, "retrieval": False, **changes.pop("more", {})}
    config = Config.model_validate({**whole, "learning": learning, **changes})
    return Learner(config, log, out, plugins=plugins, bundle=bundle)


def test_it_does_not_depend_on_batches(log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path) -> None:
    told = [replay(log, tmp_path / str(n), plugins, tiny_bundle, more={"batch_size": n}) for n in (7, 64, 300, 4000)]
    assert len({summary["examples_sha256"] for summary in told}) == 1
    assert len({summary["examples"]["waiting"] for summary in told}) > 1, "what waits counts, too"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 99},
        {"join": {"negatives": 0.6}},
        {"join": {"window_seconds": 21}},
        {"join": {"feedback": {"liked": {"name": "fnw"}}}},
    ],
)
def test_another_draw_of_negatives_another_window_and_other_feedback_give_another(
    change: dict[str, Any], log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    one = replay(log, tmp_path / "one", plugins, tiny_bundle)
    two = replay(log, tmp_path / "two", plugins, tiny_bundle, **change)
    assert one["examples_sha256"] != two["examples_sha256"]


def test_one_value_in_one_history_gives_another(
    log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The same impressions and labels; two films of one history have changed places."""
    stream = visits(150)
    place = next(n for n, (_, value) in enumerate(stream.events) if value.count(b'"history":["') and b'","' in value)
    key, value = stream.events[place]
    head, _, tail = value.partition(b'"history":[')
    past, _, rest = tail.partition(b"]")
    items = past.split(b",")
    assert len(set(items)) > 1
    swapped = head + b'"history":[' + b",".join([*items[1:], items[0]]) + b"]" + rest
    events = [*stream.events[:place], (key, swapped), *stream.events[place + 1 :]]
    other = MemoryLog()
    Stream(events).write(other)
    one = replay(log, tmp_path / "one", plugins, tiny_bundle)
    two = replay(other, tmp_path / "two", plugins, tiny_bundle)
    assert one["examples"] == two["examples"]
    assert one["examples_sha256"] != two["examples_sha256"]


def test_checkpoint_and_bundle_say_it_of_what_was_trained(
    log: MemoryLog, plugins: Plugins, tiny_bundle: Path, tmp_path: Path
) -> None:
    summary = replay(log, tmp_path, plugins, tiny_bundle, more={"batch_size": 64})
    learnt = Bundle.open(tmp_path / "bundle").manifest.metrics["learning"]
    examples = summary["examples"]
    assert learnt["examples"]["count"] == examples["trained"] == examples["joined"] - examples["waiting"]
    again = _learner(log, tmp_path, plugins, tiny_bundle, more={"batch_size": 64})
    saved = again.checkpoints.newest()
    again.close()
    assert saved is not None
    assert saved.state["examples"] == learnt["examples"]
    assert again.summary()["examples_sha256"] == summary["examples_sha256"] != learnt["examples"]["sha256"]
