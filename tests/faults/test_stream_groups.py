"""Learners that share a topic's partitions, by hand or as a group that others join and leave in mid-stream."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.brokers import Broker
from tests.faults.stream_world import (
    LearnerRun,
    World,
    adds_up,
    each_once,
    fates,
    held,
    liked,
    named,
    trained,
    world,
    zygote,
)
from tests.streaming.film_stream import BEGIN, visits

__all__ = ["world", "zygote"]
JOIN = {"window_seconds": 20, "lateness_seconds": 5}


def test_two_learners_that_share_the_partitions_by_hand_train_each_event_once(
    tansu: Broker, world: Callable[..., World]
) -> None:
    its = world(tansu, partitions=4, join=JOIN)
    stream = visits(400)
    stream.write(its.log)
    its.close_windows(BEGIN + 100_000)
    learners = [its.learn("--share", f"{n}/2", out=f"out{n}", end=True) for n in range(2)]
    summaries = [learner.summary() for learner in learners]
    for summary in summaries:
        adds_up(summary)
    total = len(its.records())
    assert [sorted(s["positions"]) for s in summaries] == [["0", "2"], ["1", "3"]]
    assert sum(s["events"]["in"] for s in summaries) == total
    counted = trained(its.audit("out0"), its.audit("out1"))
    each_once(counted)
    assert sum(counted.values()) + sum(s["examples"]["waiting"] for s in summaries) == len(stream.shown)
    assert liked(counted) <= named([*stream.liked])
    assert sum(s["join"]["liked.positives"] for s in summaries) == len(stream.liked)


def members(its: World, *names: str) -> list[LearnerRun]:
    return [its.learn("--group", its.topic, out=name) for name in names]


@pytest.mark.parametrize(("name", "client"), [("kafka09", "kafka"), ("tansu", "kafka-fast")])
def test_learners_that_join_and_leave_a_group_in_mid_stream_train_each_event_once(
    name: str, client: str, request: pytest.FixtureRequest, world: Callable[..., World]
) -> None:
    """One learner, then two; then the first is killed with -9 and comes back; then the second leaves. What was shown
    before a change is clicked after it, so the join moves with the partition. Over all learners each impression was
    trained once, as what it was."""
    broker: Broker = request.getfixturevalue(name)
    its = world(broker, partitions=4, client=client, join=JOIN, batch_size=16, checkpoint_seconds=0.2)
    (first,) = members(its, "first")
    stream = visits(1200)
    parts = np.array_split(np.arange(len(stream.events)), 12)

    def write(number: int) -> None:
        its.log.append([stream.events[n] for n in parts[number]])

    write(0)
    its.until(lambda: first.events() == len(parts[0]), "the first reads")
    (second,) = members(its, "second")
    done = _until_read(its, write, range(1, 4), lambda: held(its, "second"))
    done = _until_read(its, write, range(done, 5), lambda: second.events() > 0)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = _until_read(its, write, range(done, 8), lambda: len(held(its, "second")) == 4)
    (first,) = members(its, "first")
    done = _until_read(its, write, range(done, 11), lambda: first.events() > 0 and _owns(its, "first"))
    gone = second.end()
    for number in range(done, 12):
        write(number)
    its.close_windows(BEGIN + 100_000)
    its.until(lambda: _owned(its) == {"first"}, "the first has all")
    ends = {str(p): end for p, end in its.log.ends().items()}
    its.until(lambda: held(its, "first") == ends, "it has read all")
    its.until(lambda: first.metric("plexrank_learner_waiting") == 0, "it has trained all that is joined")
    last = first.end()

    assert last["kept"] == {}
    counted = trained(its.audit("first"), its.audit("second"))
    each_once(counted)
    assert {(r, i): kind for r, i, kind in counted} == fates(stream)
    for summary in (gone, last):
        events = summary["events"]
        assert events["in"] == sum(n for outcome, n in events.items() if outcome != "in")
    assert gone["events"]["in"] + last["events"]["in"] == len(its.records())
    assert gone["examples"]["trained"] + last["examples"]["trained"] == len(stream.shown)
    assert gone["examples"]["joined"] + last["examples"]["joined"] == len(stream.shown)
    assert gone["join"]["liked.positives"] + last["join"]["liked.positives"] == len(stream.liked)
    assert gone["examples"]["trained"] > 0
    assert last["waiting"] == {"0": 0, "1": 0, "2": 0, "3": 0}


def _until_read(its: World, write: Callable[[int], None], numbers: range, true: Callable[[], Any]) -> int:
    """Writes these parts of the stream, one after another, until something is true as well -> the next part."""
    for number in numbers:
        write(number)
        time.sleep(0.3)
    its.until(true, "the group shares anew")
    return numbers.stop


def _owned(its: World) -> set[str]:
    """The members whose checkpoints answer for a partition."""
    folder = its.folder / "learners" / "learners" / "events" / f"group-{its.topic}"
    return {Path(json.loads(file.read_text())["checkpoints"]).parent.name for file in folder.glob("*.json")}


def _owns(its: World, name: str) -> bool:
    return name in _owned(its)
