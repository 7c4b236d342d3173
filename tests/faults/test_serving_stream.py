"""The server while its event log is away, comes back, or never was there: it answers, says so, and loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from away_log import AwayLog
from test_serving_server import click, models, serve

from engine.config import ServingConfig
from engine.plugins import GROUP, Plugins
from serving.app import serve_with
from serving.service import Service

__all__ = ["models"]

WAITS = "events: waiting in the local log"


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    pytest.fail(f"not within ten seconds: {what}")


class World:
    def __init__(self, models: Path, state: Path) -> None:
        self.models, self.state = models, state
        self.log = AwayLog.begin()
        self.options: dict[str, Any] = {}
        self.client: Any = None
        self.service: Service
        self._stop: Callable[[], None] = lambda: None

    def start(self) -> None:
        points = [*entry_points(group=GROUP), EntryPoint("event_logs.away", "away_log", GROUP)]
        config = ServingConfig.model_validate({"event_log": {"name": "away"}, **self.options})
        self.service = Service.open(self.models / "tiny", config, self.state, Plugins(points))
        self.client, self._stop = serve(serve_with(self.service))

    def stop(self) -> None:
        self._stop()
        self._stop = lambda: None

    def receive(self, user: str, *ids: str) -> Any:
        """The receipts' statuses, and what was degraded."""
        data = {"type": "click", "user": user}
        events = [
            {"id": i, "source": "t", "type": "interaction", "data": {**data, "item": str(n)}} for n, i in enumerate(ids)
        ]
        answer = self.client.post("/v1/events", json=events)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def ids(self, kind: str = "interaction") -> list[str]:
        """Ids of the log's events in order; those sent twice, once."""
        found = [json.loads(record.value) for record in self.log.records if record.value]
        return list(dict.fromkeys(event["id"] for event in found if event["type"] == kind))

    def back(self) -> None:
        self.log.down(False)
        until(lambda: not self.service.waits, "the log is written directly again")


@pytest.fixture
def world(models: Path, tmp_path: Path) -> Iterator[World]:
    made = World(models, tmp_path / "state")
    yield made
    made.log.down(False)
    made.stop()


def test_while_the_log_is_away_events_are_taken_and_everything_says_degraded(world: World) -> None:
    world.start()
    assert world.receive("u1", "a")["events"][0]["offset"] == 0
    world.log.down()
    first = world.receive("u1", "b", "c")
    assert first == {
        "events": [{"id": "b", "status": "accepted"}, {"id": "c", "status": "accepted"}],
        "degraded": [WAITS],
    }
    assert world.receive("u1", "b", "d")["events"] == [
        {"id": "b", "status": "duplicate"},
        {"id": "d", "status": "accepted"},
    ]
    history = [visit["item"] for visit in world.client.get("/v1/users/u1").json()["history"]]
    assert history[:1] == ["1"], "a click is in the history although the log is away"
    ranked = world.client.post("/v1/rank", json={"user": "u1", "items": ["1", "2"]})
    assert ranked.status_code == 200
    assert ranked.json()["degraded"] == [WAITS]
    ready = world.client.get("/health/ready")
    assert ready.status_code == 200
    assert WAITS in ready.json()["degraded"]
    until(lambda: readiness(world) == [WAITS, "items: not followed"], "other servers' items are not heard of")
    page = world.client.get("/?user=u1").text
    assert f"degraded: {WAITS}" in page
    until(lambda: world.service.waiting >= 5, "the answers' events wait too")
    assert "plexrank_events_spooled 5.0" in world.client.get("/metrics").text
    world.back()
    assert world.ids() == ["a", "b", "c", "d"]
    assert len(world.ids("ranking")) == 2
    assert world.client.post("/v1/rank", json={"user": "u1", "items": ["1"]}).json()["degraded"] == []
    until(lambda: readiness(world) == [], "other servers' items are followed again")
    assert 'plexrank_event_lag_seconds_count{stage="forward"}' in world.client.get("/metrics").text


def readiness(world: World) -> list[str]:
    found: list[str] = world.client.get("/health/ready").json()["degraded"]
    return found


def test_a_server_starts_without_its_log_and_knows_what_waited_before(world: World) -> None:
    world.start()
    world.receive("u1", "a")
    world.log.down()
    world.receive("u2", "b")
    world.service.store.delete("u2")  # as if the crash had come before it got there
    world.stop()
    world.start()
    assert world.receive("u2", "b", "c")["events"] == [
        {"id": "b", "status": "duplicate"},
        {"id": "c", "status": "accepted"},
    ]
    assert {visit["item"] for visit in world.client.get("/v1/users/u2").json()["history"]} == {"0", "1"}
    world.back()
    assert world.ids() == ["a", "b", "c"]


def test_answers_leave_half_of_the_room_to_what_users_do(world: World) -> None:
    world.options = {"forward_bytes": 1 << 16}
    world.start()
    world.log.down()
    items = [str(n) for n in range(30)]
    for _ in range(40):
        assert world.client.post("/v1/rank", json={"user": "u1", "items": items}).status_code == 200
    assert world.service.rankings is not None
    assert world.service.rankings.flush()
    assert world.service.logged.unlogged > 0
    assert world.receive("u1", "kept")["events"][0]["status"] == "accepted"
    world.back()
    assert world.ids() == ["kept"]
    assert len(world.ids("ranking")) == world.service.logged.logged


def test_when_no_more_may_wait_events_are_refused_and_can_be_sent_again(world: World) -> None:
    world.options = {"forward_bytes": 1 << 16, "log_rankings": False}
    world.start()
    world.log.down()
    taken = 0
    while (answer := click(world.client, "u1", "1", f"e{taken}")).status_code == 202:
        taken += 1
    assert taken > 50
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert "no more are taken until it is back" in answer.json()["detail"]
    world.back()
    assert click(world.client, "u1", "1", f"e{taken}").json()["events"][0]["status"] == "accepted"
    assert world.ids() == [f"e{n}" for n in range(taken + 1)]


def test_who_is_forgotten_while_the_log_is_away_does_not_come_back_with_it(world: World) -> None:
    world.start()
    world.log.down()
    world.receive("gone", "g")
    world.receive("stays", "s")
    refused = world.client.delete("/v1/users/gone")
    assert refused.status_code == 503, "the log may hold more of them: to be asked again"
    assert world.client.get("/v1/users/gone").status_code == 404
    world.back()
    assert world.ids() == ["s"]
    assert world.client.delete("/v1/users/gone").status_code == 200


def test_a_click_on_the_page_counts_while_the_log_is_away(world: World) -> None:
    world.start()
    world.log.down()
    headers = {"sec-fetch-site": "same-origin", "hx-request": "true"}
    page = world.client.post("/playground/events", data={"user": "page", "item": "5"}, headers=headers)
    assert page.status_code == 200
    assert "waits on this machine for the log, history 0 → 1" in page.text
