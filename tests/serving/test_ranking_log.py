"""What was answered enters the log with the values that were served; it never holds an answer up."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.components import ScoreRequest, UserState
from engine.config import ServingConfig
from engine.deadline import Deadline
from engine.events import EventLimits, RankingData, decode_event
from engine.pipeline import Query
from serving.ranking_log import RankingLog
from serving.service import Service

ITEMS = [str(n) for n in range(30)]


def events(service: Service, request_id: str) -> list[tuple[str, dict[str, Any]]]:
    """(key, event) of one answer in the log."""
    assert service.rankings is not None
    assert service.rankings.flush()
    records = [r for r in service.log.read({0: 0}, 1_000_000) if r.value]
    found = [(r.key, msgspec.json.decode(r.value)) for r in records]
    return [(key, event) for key, event in found if event["type"] == "ranking" and event["id"] == request_id]


def test_every_answer_is_logged_with_what_it_was_scored_with(server: Any) -> None:
    before = time.time()
    body = {"user": "u1", "items": ITEMS, "item_features": {"year": [None] * 29 + [2050]}}
    answer = server.client.post("/v1/rank", json=body).json()
    ((key, event),) = events(server.service, answer["request_id"])
    assert key == "u1"
    assert event["source"] == "plexrank"
    decoded = decode_event(msgspec.json.encode(event), EventLimits())
    assert before - 1 <= decoded.seconds <= time.time()
    data = decoded.data
    assert isinstance(data, RankingData)
    assert (data.request_id, data.user) == (answer["request_id"], "u1")
    assert (data.model, data.version) == (answer["model"]["name"], answer["model"]["version"])
    shown = [{"id": i.id, "score": i.score, "position": i.position, "propensity": i.propensity} for i in data.items]
    assert shown == answer["items"]
    state = server.service.store.get("u1")
    assert data.history == state.history[:10], "ten are what the model reads"
    assert data.user_features == {"user_id": "u1", **state.features}
    last = [item["id"] for item in answer["items"]].index("29")
    assert data.item_features is not None
    assert data.item_features["year"] == [2050 if n == last else None for n in range(30)]
    assert data.shown is None


def test_the_logged_values_give_the_logged_scores_again(server: Any) -> None:
    answer = server.client.post("/v1/recommend", json={"user": "u2", "count": 10}).json()
    ((_, event),) = events(server.service, answer["request_id"])
    data = event["data"]
    ids = [item["id"] for item in data["items"]]
    request = ScoreRequest(data["user_features"], {"item_id": data["history"]}, ids)
    scores = server.service.scorer.score(request).tasks["liked"]
    np.testing.assert_allclose(scores, [item["score"] for item in data["items"]], atol=1e-6)


def test_an_answer_for_nobody_has_its_request_as_the_key(server: Any) -> None:
    answer = server.client.post("/v1/rank", json={"items": ["1", "2"], "history": [3, 4]}).json()
    ((key, event),) = events(server.service, answer["request_id"])
    assert key == answer["request_id"] == event["data"]["user"]
    assert event["data"]["history"] == ["3", "4"]
    assert "user_id" not in event["data"]["user_features"]


def test_what_the_page_shows_is_logged_too(server: Any) -> None:
    assert server.service.rankings.flush()
    before = server.service.logged.logged
    assert server.client.get("/?user=u3").status_code == 200
    assert server.service.rankings.flush()
    assert server.service.logged.logged == before + 1
    assert f"plexrank_rankings_logged_total {before + 1:.1f}" in server.client.get("/metrics").text


def test_features_of_a_user_that_the_model_does_not_read_stay_out(server: Any) -> None:
    user = f"private-{uuid.uuid4().hex}"
    body = {"id": user, "source": "t", "type": "user", "data": {"user": user, "features": {"diary": "dear"}}}
    assert server.client.post("/v1/events", json=body).status_code == 202
    answer = server.client.post("/v1/rank", json={"user": user, "items": ["1"]}).json()
    ((_, event),) = events(server.service, answer["request_id"])
    assert event["data"]["user_features"] == {"user_id": user}


@pytest.fixture
def small(models: Path, tmp_path: Path) -> Iterator[Service]:
    """A service that logs at most three items of an answer."""
    config = ServingConfig.model_validate({"log_items": 3})
    service = Service.open(models / "tiny", config, tmp_path)
    yield service
    service.close()


def ask(service: Service, user: str = "u1", **features: Any) -> Any:
    query = Query(uuid.uuid4().hex, Deadline(10.0), user, features=features)
    return service.rank(query, ITEMS, {"year": [2000 + n for n in range(30)]})


def test_a_long_answer_is_cut_and_says_so(small: Service) -> None:
    answer = ask(small)
    ((_, event),) = events(small, answer.request_id)
    data = event["data"]
    assert [item["id"] for item in data["items"]] == answer.items[:3]
    assert data["item_features"]["year"] == [2000 + int(item) for item in answer.items[:3]]
    assert data["shown"] == 30


def test_features_that_did_not_fit_are_not_said_to_have_been_used(small: Service) -> None:
    small.store.put([UserState("odd", {"user_id": ["a", "b"]}, ["1"], [1], ["1"])])
    answer = ask(small, "odd")
    ((_, event),) = events(small, answer.request_id)
    assert event["data"]["user_features"] == {"user_id": "odd"}


class Slow:
    """A log whose appends wait, or fail."""

    def __init__(self) -> None:
        self.fails = False
        self.taken: list[str] = []
        self.seconds = 0.0

    def append(self, events: Any) -> list[tuple[int, int]]:
        time.sleep(self.seconds)
        if self.fails:
            raise ConnectionError("down")
        self.taken += [key for key, _ in events]
        return [(0, 0)] * len(events)


def test_answers_that_come_too_fast_are_counted_and_nobody_waits(
    small: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.ranking_log._QUEUED", 10)
    answer, slow = ask(small), Slow()
    slow.seconds = 0.2
    writer = RankingLog(slow, lambda: small.pipeline.served, 200)  # type: ignore[arg-type]
    for _ in range(300):
        writer.add(answer)
    slow.seconds = 0.0
    assert writer.flush()
    assert writer.counts.logged == len(slow.taken)
    assert writer.counts.unlogged > 200
    assert writer.counts.logged + writer.counts.unlogged == 300
    writer.close()


def test_a_log_that_fails_costs_the_events_and_no_answer(small: Service) -> None:
    answer, slow = ask(small), Slow()
    slow.fails = True
    writer = RankingLog(slow, lambda: small.pipeline.served, 200)  # type: ignore[arg-type]
    writer.add(answer)
    assert writer.flush()
    assert (writer.counts.logged, writer.counts.unlogged) == (0, 1)
    slow.fails = False
    writer.add(answer)
    writer.close()
    assert (writer.counts.logged, writer.counts.unlogged) == (1, 1)


def test_answers_of_a_user_who_was_forgotten_are_not_written(small: Service) -> None:
    answer, other, slow = ask(small, "gone"), ask(small, "stays"), Slow()
    slow.seconds = 0.1
    writer = RankingLog(slow, lambda: small.pipeline.served, 200)  # type: ignore[arg-type]
    for _ in range(100):
        writer.add(other)
    writer.add(answer)
    writer.forget("gone")
    writer.add(other)
    assert writer.flush()
    assert "gone" not in slow.taken
    writer.add(answer)
    writer.close()
    assert slow.taken[-1] == "gone", "who comes back is logged again"


def test_it_can_be_switched_off(models: Path, tmp_path: Path) -> None:
    service = Service.open(models / "tiny", ServingConfig.model_validate({"log_rankings": False}), tmp_path)
    ask(service)
    assert service.rankings is None
    assert list(service.log.read({0: 0})) == []
    service.close()
