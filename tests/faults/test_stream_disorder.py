"""Events that come twice and out of order, clocks that jump, a disk that is full, a learner too many."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from tests.brokers import Broker
from tests.faults.stream_world import World, adds_up, each_once, fates, trained, turn_clock, world, zygote
from tests.streaming.film_stream import BEGIN, click, ranking, visits

__all__ = ["world", "zygote"]
JOIN = {"window_seconds": 20, "lateness_seconds": 5, "idle_seconds": 60}


def test_events_that_are_posted_twice_and_out_of_order_are_trained_as_if_they_were_not(
    tansu: Broker, world: Callable[..., World]
) -> None:
    """Each event is posted to the server twice, up to five seconds from its place; the server knows again what it took.
    Then some other producer writes every third to the topic once more, which only the learner can know."""
    its = world(tansu, join=JOIN)
    server, stream = its.serve(), visits(250)
    rng = np.random.default_rng(3)
    count = len(stream.events)
    places = np.argsort(np.repeat(np.arange(count), 2) + rng.uniform(0, 8, 2 * count)) // 2
    told: Counter[str] = Counter()
    for some in np.array_split(places, 20):
        response = server.client.post("/v1/events", json=[json.loads(stream.events[n][1]) for n in some.tolist()])
        assert response.status_code == 202, response.text
        told.update(receipt["status"] for receipt in response.json()["events"])
    assert told == {"accepted": count, "duplicate": count}
    its.log.append(stream.events[::3])
    its.close_windows(BEGIN + 100_000)
    summary = its.learn(end=True).summary()

    adds_up(summary)
    assert summary["events"]["in"] == len(its.records())
    assert summary["events"]["duplicates"] == len(stream.events[::3])
    assert summary["events"]["dead"] == 0
    counted = trained(its.audit())
    each_once(counted)
    assert {(r, i): kind for r, i, kind in counted}.items() <= fates(stream).items()
    assert sum(counted.values()) + summary["examples"]["waiting"] == len(stream.shown)
    assert summary["join"]["liked.positives"] == len(stream.liked)


def test_a_clock_that_jumps_closes_no_window_and_loses_no_event(tansu: Broker, world: Callable[..., World]) -> None:
    """The learner's clock stands after all events; then an hour too late, which changes nothing; then an hour too
    early, so that events lie in the future: dead letters, which are sent again when the clock is right. Of single
    events whose sender's clock is wrong, the one ahead is dead; of the two behind, the ranking becomes negative at
    once and is forgotten, and the click on it is an orphan."""
    its = world(tansu, join=JOIN, dead_share=1.0)
    stream, clock = visits(300), its.clock()
    right = BEGIN + 400 - time.time()
    turn_clock(clock, right)
    learner = its.learn(clock=clock)
    third = 1 + len(stream.events) // 3
    thirds = [stream.events[n : n + third] for n in range(0, len(stream.events), third)]

    def read(count: int) -> None:
        its.until(lambda: learner.events() == count, f"{count} events are read")

    its.log.append(thirds[0])
    read(len(thirds[0]))
    its.log.append([("u1", ranking("ahead", "u1", ["1"], BEGIN + 4000))])
    its.log.append([("u1", ranking("behind", "u1", ["2"], BEGIN - 3600))])
    read(so_far := len(thirds[0]) + 2)
    its.log.append([("u1", click("tardy", "u1", "2", "behind", BEGIN - 3599))])
    read(so_far := so_far + 1)
    turn_clock(clock, right + 3600)
    its.log.append(thirds[1])
    read(so_far := so_far + len(thirds[1]))
    assert learner.metric('plexrank_learner_events_total{outcome="dead"}') == 1
    turn_clock(clock, right - 3600)
    its.log.append(thirds[2])
    read(so_far := so_far + len(thirds[2]))
    assert learner.metric('plexrank_learner_events_total{outcome="dead"}') == 1 + len(thirds[2])
    turn_clock(clock, right)
    again = its.command(
        "events", "dead", "resubmit", str(its.config), "--reason", "future", "--state-dir", str(its.folder), "--json"
    )
    assert again.wait() == 0, again.said()
    read(so_far := so_far + len(thirds[2]) + 1)
    its.close_windows(BEGIN + 600)
    its.consumed([learner])
    summary = learner.end()

    adds_up(summary)
    assert summary["events"]["in"] == len(its.records())
    assert summary["events"]["dead"] == len(thirds[2]) + 2, "the one ahead is dead again"
    letters = [json.loads(record.value) for record in its.records("dead")]
    assert Counter(letter.get("reason") for letter in letters)["future"] == len(thirds[2]) + 2
    counted = trained(its.audit())
    each_once(counted)
    behind = sorted(kind for r, i, kind in counted if (r, i) not in fates(stream))
    assert behind == [1], "its window had ended long ago"
    assert summary["join"]["orphans"] == 1, "the click on it is counted"
    assert {(r, i): kind for r, i, kind in counted if (r, i) in fates(stream)} == fates(stream)


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_learning_goes_on(
    tansu: Broker, world: Callable[..., World]
) -> None:
    """No file of the learner can be as long as a checkpoint: it goes on, says so, and writes one when there is room.
    Killed meanwhile, it would have gone on from the last one; killed after, it trains the rest once."""
    its = world(tansu, join=JOIN, checkpoint_seconds=0.1)
    stream = visits(400)
    quarter = 1 + len(stream.events) // 4
    parts = [stream.events[n : n + quarter] for n in range(0, len(stream.events), quarter)]
    learner = its.learn()
    checkpoints = its.folder / "out" / "checkpoints"
    its.log.append(parts[0])
    its.until(lambda: learner.events() == quarter and [*checkpoints.glob("step-*")], "a checkpoint")
    whole = max(file.stat().st_size for file in checkpoints.glob("*/*.safetensors"))
    learner.disk(whole // 2)
    its.until(lambda: learner.metric("plexrank_learner_checkpoints_failed_total") > 0, "the disk is full")
    kept = {path.name for path in checkpoints.glob("step-*")}
    its.log.append(parts[1])
    its.until(lambda: learner.events() == 2 * quarter, "learning goes on")
    its.until(lambda: learner.metric("plexrank_learner_checkpoints_failed_total") > 3, "it tries again")
    assert {path.name for path in checkpoints.glob("step-*")} == kept
    assert its.audit().stat().st_size < whole // 2
    learner.disk(-1)
    its.until(lambda: {path.name for path in checkpoints.glob("step-*")} != kept, "there is room again")
    its.log.append(parts[2])
    its.until(lambda: learner.events() == 3 * quarter, "all is read")
    learner.signal(signal.SIGKILL)
    assert learner.wait() == -signal.SIGKILL
    its.log.append(parts[3])
    its.close_windows(BEGIN + 100_000)
    summary = its.learn(end=True).summary()

    adds_up(summary)
    assert summary["checkpoints_failed"] == 0
    assert summary["events"]["in"] == len(its.records())
    counted = trained(its.audit())
    each_once(counted)
    assert {(r, i): kind for r, i, kind in counted}.items() <= fates(stream).items()
    assert sum(counted.values()) + summary["examples"]["waiting"] == len(stream.shown)


def test_a_learner_too_many_is_refused_and_the_first_goes_on(tansu: Broker, world: Callable[..., World]) -> None:
    """The same partition, the same folder, the same model to publish: each is refused with what to do, exit 1."""
    its = world(tansu, join=JOIN)
    its.registry.publish(its.bundle, 1, "begun")
    first = its.learn("--partitions", "0", publish=True)
    stream = visits(60)
    stream.write(its.log)
    its.until(lambda: first.metric("plexrank_learner_events_total") > 0, "the first learns")
    cases = [
        (its.learn(out="second"), "partition 0 is learnt from by process"),
        (its.learn("--partitions", "1"), "writes its checkpoints there"),
        (its.learn("--partitions", "1", out="third", publish=True), "publishes this model already"),
    ]
    for learner, says in cases:
        assert learner.wait() == 1
        assert says in learner.said()
        assert f"process {first.pid}" in learner.said()
        assert "Traceback" not in learner.said()
        its.forget(learner)
    its.close_windows(BEGIN + 100_000)
    ends = its.log.ends()
    its.until(lambda: first.events() == ends[0], "the first goes on")
    summary = first.end()
    adds_up(summary)
    assert summary["positions"] == {"0": ends[0]}
    each_once(trained(its.audit()))
    rest = its.learn("--partitions", "1", out="second", end=True).summary()
    adds_up(rest)
    assert rest["events"]["in"] + summary["events"]["in"] == len(its.records())
