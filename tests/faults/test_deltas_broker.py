"""Deltas over a real broker: all of them are applied, also those made while it hangs or is dead."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plugins.events.kafka import KafkaEventLog
from tests.brokers import Broker
from tests.streaming.chain_world import A, B, World, a_delta, rows_after, wait_for


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Broker], World]]:
    """Followers read another folder than the publisher's files lie in, so that the broker alone brings deltas."""
    logs: list[Any] = []
    worlds: list[World] = []

    def open_(broker: Broker) -> World:
        topic = f"deltas-{uuid.uuid4().hex[:12]}"
        broker.make_topic(f"{topic}.deltas", 1)
        broker.make_topic(f"{topic}.models", 1)
        options = {**broker.options, "topic": topic, "partitions": 1, "timeout_ms": 1000}
        events = KafkaEventLog(KafkaEventLog.Options.model_validate(options))
        deltas = events.sibling("deltas", partitions=1)
        models = events.sibling("models", partitions=1, compact=True)
        logs.extend([events, deltas, models])
        worlds.append(World(tmp_path / f"world-{len(worlds)}", deltas, models))
        return worlds[-1]

    yield open_
    for world in worlds:
        world.close()
    for log in logs:
        log.close()


def sent(publisher: Any) -> None:
    """The outbox is empty; a broker that has just come back may need a moment."""
    assert publisher.drain(60), f"the deltas still wait: {publisher.trouble}"


@pytest.mark.parametrize("name", ["tansu", "kafka09"])
def test_fifty_deltas_are_applied_in_order(
    name: str, request: pytest.FixtureRequest, opened: Callable[[Broker], World], tmp_path: Path
) -> None:
    world = opened(request.getfixturevalue(name))
    publisher = world.publisher()
    publisher.publish_bundle(world.bundles[A], 1, "first")
    _, scorer = world.follower(folder=tmp_path / "none")
    wait_for(lambda: scorer.at == A, "the bundle")
    for sequence in range(1, 51):
        assert not publisher.publish(a_delta(A, 1, sequence)).waits
    wait_for(lambda: scorer.at == f"{A}+1.50", f"all of them, it is at {scorer.at}", 60)
    assert scorer.taken == [f"{A}+1.{sequence}" for sequence in range(1, 51)]
    assert scorer.rows == rows_after(50)
    late, from_the_broker = world.follower(folder=tmp_path / "none")
    wait_for(lambda: from_the_broker.at == f"{A}+1.50", "one that starts late", 60)
    assert from_the_broker.rows == rows_after(50)
    assert late.status().trouble is None


def test_deltas_made_while_the_broker_hangs_follow_when_it_goes_on(
    own_tansu: Broker, opened: Callable[[Broker], World], tmp_path: Path
) -> None:
    own_tansu.start()
    world = opened(own_tansu)
    publisher = world.publisher()
    publisher.publish_bundle(world.bundles[A], 1, "first")
    follower, scorer = world.follower(folder=tmp_path / "none")
    for sequence in range(1, 21):
        publisher.publish(a_delta(A, 1, sequence))
    wait_for(lambda: scorer.at == f"{A}+1.20", "what came before", 60)
    own_tansu.pause()
    for sequence in range(21, 26):
        publisher.publish(a_delta(A, 1, sequence))
        if sequence == 22:
            assert publisher.waiting == 2, "one that was begun to be sent, and one for all others"
    assert publisher.waiting == 2
    wait_for(lambda: follower.status().trouble is not None, "the follower says why nothing comes", 60)
    assert scorer.at == f"{A}+1.20"
    own_tansu.go_on()
    sent(publisher)
    for sequence in range(26, 51):
        publisher.publish(a_delta(A, 1, sequence))
    sent(publisher)
    wait_for(lambda: scorer.at == f"{A}+1.50", f"all of them, it is at {scorer.at}", 60)
    assert scorer.rows == rows_after(50)
    wait_for(lambda: follower.status().trouble is None, "nothing is wrong any more", 60)
    assert scorer.loaded == [A]


def test_a_broker_that_was_killed_and_keeps_its_log_goes_on_with_the_chain(
    tansu_s3: Broker, opened: Callable[[Broker], World], tmp_path: Path
) -> None:
    world = opened(tansu_s3)
    publisher = world.publisher()
    publisher.publish_bundle(world.bundles[A], 1, "first")
    _, scorer = world.follower(folder=tmp_path / "none")
    for sequence in range(1, 6):
        publisher.publish(a_delta(A, 1, sequence))
    wait_for(lambda: scorer.at == f"{A}+1.5", "what came before", 60)
    tansu_s3.kill()
    for sequence in range(6, 9):
        publisher.publish(a_delta(A, 1, sequence))
    tansu_s3.start()
    sent(publisher)
    wait_for(lambda: scorer.at == f"{A}+1.8", f"what came meanwhile, it is at {scorer.at}", 60)
    assert scorer.rows == rows_after(8)
    pointer = publisher.publish_bundle(world.bundles[B], 1, "next")
    publisher.publish(a_delta(B, pointer.epoch, 1))
    wait_for(lambda: scorer.at == f"{B}+1.1", "the next bundle's chain", 60)
