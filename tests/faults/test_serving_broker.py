"""A server over a real broker that was never there, stops, or hangs: it takes events, and they follow in order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serving_server import models

from engine.config import ServingConfig
from engine.errors import LogUnavailable
from serving.service import Service
from tests.brokers import Broker

__all__ = ["models"]


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"not within a minute: {what}")


class World:
    def __init__(self, models: Path, state: Path, broker: Broker, topic: str) -> None:
        options = {**broker.options, "topic": topic, "partitions": 2, "timeout_ms": 1000}
        self.config = ServingConfig.model_validate(
            {"event_log": {"name": "kafka", "options": options}, "log_rankings": False}
        )
        self.service = Service.open(models / "tiny", self.config, state)
        self.sent: list[str] = []

    def click(self, user: str = "u1") -> tuple[str, list[str]]:
        """One more event -> what became of it, and what was degraded."""
        name = f"e{len(self.sent)}"
        data = {"type": "click", "user": user, "item": str(len(self.sent) % 30)}
        event = {"id": name, "source": "t", "type": "interaction", "data": data}
        received = self.service.receive([json.dumps(event).encode()])
        self.sent.append(name)
        return received.receipts[0].status, received.degraded

    def back(self) -> None:
        until(lambda: not self.service.waits, "the log is written directly again")

    def in_the_log(self, key: str = "u1") -> list[str]:
        """A user's events in the broker's order; what came twice, once. A broker that has just begun may need time."""
        log, records = self.service.log, []
        for turn in range(10):
            try:
                records = [r for p, begin in log.begins().items() for r in log.read({p: begin}, 100_000)]
                break
            except LogUnavailable:
                if turn == 9:
                    raise
        return list(dict.fromkeys(json.loads(r.value)["id"] for r in records if r.key == key))


@pytest.fixture
def opened(models: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[Broker], World]]:
    worlds: list[World] = []

    def open_(broker: Broker) -> World:
        topic = f"events-{request.node.name[:60]}-{time.time_ns()}"
        worlds.append(World(models, tmp_path / "state", broker, topic))
        return worlds[-1]

    yield open_
    for world in worlds:
        world.service.close()


WAITING = ("accepted", ["events: waiting in the local log"])


def test_a_broker_that_is_not_there_yet_is_waited_for(opened: Any, own_tansu: Broker) -> None:
    world = opened(own_tansu)
    for _ in range(5):
        assert world.click() == WAITING
    own_tansu.start()
    world.back()
    assert world.click() == ("accepted", [])
    assert world.in_the_log() == world.sent


@pytest.mark.parametrize("name", ["tansu_s3", "kafka09"])
def test_a_broker_that_is_killed_and_started_again_gets_all_in_order(
    opened: Any, name: str, request: pytest.FixtureRequest
) -> None:
    broker: Broker = request.getfixturevalue(name)
    world = opened(broker)
    for _ in range(3):
        assert world.click() == ("accepted", [])
    broker.kill()
    try:
        for _ in range(20):
            assert world.click() == WAITING
        assert world.service.waiting == 20
    finally:
        broker.start()
    for _ in range(5):
        world.click()
    world.back()
    assert world.click() == ("accepted", [])
    assert world.in_the_log() == world.sent


def test_a_broker_that_hangs_costs_one_wait_and_no_event(opened: Any, own_tansu: Broker) -> None:
    own_tansu.start()
    world = opened(own_tansu)
    world.click()
    own_tansu.pause()
    time.sleep(0.2)  # until all of its threads stand still
    try:
        for _ in range(10):
            assert world.click() == WAITING
    finally:
        own_tansu.go_on()
    world.back()
    assert world.in_the_log() == world.sent
