"""A gateway that scores through Triton: one line of the configuration; what it answers while Triton is slow or gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.config import ComponentConfig
from serving.app import create_app
from tests.scorers.conftest import loaded
from tests.scorers.triton_server import TritonLike, request
from tests.serving.conftest import Running

ITEMS = [str(n) for n in range(30)]
BODY = {"user": "u3", "history": ["4", "9"], "items": ITEMS, "timeout_ms": 1000}


@pytest.fixture(scope="module")
def triton(tiny_bundle: Path) -> Iterator[TritonLike]:
    server = TritonLike("tiny", {"1": tiny_bundle})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(triton: TritonLike, models: Path, tmp_path_factory: pytest.TempPathFactory, listen: Any) -> Iterator[Any]:
    """Gateways by their `fallback`, made when they are first asked for."""
    running: dict[str, Running] = {}
    stops = []

    def with_fallback(fallback: str) -> Running:
        if fallback not in running:
            options = {"url": triton.url, "fallback": fallback, "breaker": {"failures": 3, "pause_s": 0.05}}
            scorer = ComponentConfig(name="triton", options=options)
            bundled = Bundle.open(models / "tiny").config.serving
            limits = bundled.limits.model_copy(update={"threads": 4})
            config = bundled.model_copy(update={"scorer": scorer, "limits": limits})
            app = create_app(models / "tiny", config, tmp_path_factory.mktemp("state"))
            running[fallback], stop = listen(app)
            stops.append(stop)
        return running[fallback]

    yield with_fallback
    for stop in stops:
        stop()


@pytest.fixture(autouse=True)
def well(triton: TritonLike, gateway: Callable[[str], Running]) -> Iterator[None]:
    """Each test leaves Triton well, and the gateways asking it."""
    yield
    triton.before = lambda context: None
    if triton._server is None:
        triton.start()
    for fallback in ("inproc", "none"):
        scorer = gateway(fallback).service.scorer
        until(lambda scorer=scorer: not scorer.degraded())  # type: ignore[misc]
    triton.forget()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def by_score(answer: dict[str, Any]) -> dict[str, float]:
    return {item["id"]: item["score"] for item in answer["items"]}


@pytest.mark.parametrize("fallback", ["inproc", "none"])
def test_a_ranking_has_the_scores_that_the_model_has(
    triton: TritonLike, gateway: Any, tiny_bundle: Path, fallback: str
) -> None:
    answer = gateway(fallback).client.post("/v1/rank", json=BODY).json()
    wanted = loaded(tiny_bundle).score(request(30)).tasks["liked"]
    found = by_score(answer)
    np.testing.assert_allclose([found[item] for item in ITEMS], wanted, atol=1e-6)
    assert answer["degraded"] == []
    assert answer["model"] == {"name": "tiny", "version": Bundle.open(tiny_bundle).version}
    assert triton.asked


def test_while_triton_is_slow_the_copy_answers_inside_the_deadline(triton: TritonLike, gateway: Any) -> None:
    """None of the answers was lost by the pipeline for lateness: that would read `rank: deadline`."""
    running, held = gateway("inproc"), threading.Event()
    well = by_score(running.client.post("/v1/rank", json=BODY).json())
    triton.before = lambda context: hold(held)
    patient = BODY | {"timeout_ms": 2000}
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: running.client.post("/v1/rank", json=patient).json(), range(12))]
    held.set()
    for answer in answers:
        assert answer["degraded"] == ["rank: triton: deadline; scored by inproc"]
        assert by_score(answer) == pytest.approx(well, abs=1e-6)
    requests = [t for _, t in triton.asked if len(t["candidates"]) == 30 and "user_id" in t]
    assert len(requests) < 12, "after three failures it was left alone"


def hold(held: threading.Event) -> None:
    held.wait(20)


def test_without_a_copy_popularity_answers_and_says_why(triton: TritonLike, gateway: Any) -> None:
    client = gateway("none").client
    triton.stop()
    for _ in range(5):
        answer = client.post("/v1/rank", json=BODY).json()
        assert answer["degraded"] == ["rank: triton: unavailable"]
        assert len(answer["items"]) == 30
    found = client.post("/v1/recommend", json={"user": "u5", "count": 5, "timeout_ms": 1000}).json()
    assert found["degraded"] == ["rank: triton: unavailable"]
    assert len(found["items"]) == 5
    assert client.get("/health/ready").status_code == 503


def test_a_copy_keeps_the_gateway_ready_and_it_says_what_is_wrong(triton: TritonLike, gateway: Any) -> None:
    client = gateway("inproc").client
    assert client.get("/health/ready").json()["degraded"] == []
    triton.stop()
    for _ in range(3):
        client.post("/v1/rank", json=BODY)
    ready = client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json()["degraded"] == ["rank: triton: unavailable; scored by inproc"]
    metrics = client.get("/metrics").text
    assert 'plexrank_scorer_asked{scorer="triton"} 0.0' in metrics
    triton.start()
    until(lambda: not client.get("/health/ready").json()["degraded"])
    assert client.post("/v1/rank", json=BODY).json()["degraded"] == []
    metrics = client.get("/metrics").text
    assert 'plexrank_scorer_asked{scorer="triton"} 1.0' in metrics
    assert 'plexrank_scorer_failures_total{reason="unavailable",scorer="triton"}' in metrics
    assert 'plexrank_scorer_fallbacks_total{scorer="triton"}' in metrics
    assert 'plexrank_scorer_call_duration_seconds_bucket{le="0.01",scorer="triton"}' in metrics


def test_explanations_need_the_copy(gateway: Any) -> None:
    for fallback, status in (("inproc", 200), ("none", 409)):
        client = gateway(fallback).client
        answer = client.post("/v1/rank", json=BODY).json()
        explained = client.get(f"/v1/explain/{answer['request_id']}")
        assert explained.status_code == status
        if status == 409:
            assert "fallback: inproc" in explained.json()["detail"]
    page = gateway("none").client.get("/", params={"user": "u3"})
    assert page.status_code == 200
    assert "the model&#39;s reasons are not available" in page.text


def test_an_item_that_an_event_changes_scores_so_at_once(triton: TritonLike, gateway: Any) -> None:
    """Triton has the bundle's items; the gateway sends the features of one that reads otherwise."""
    running = gateway("none")
    before = by_score(running.client.post("/v1/rank", json=BODY).json())
    event = {
        "id": "i1",
        "source": "test",
        "specversion": "1.0",
        "type": "item",
        "data": {"item": "7", "features": {"year": 1871, "genres": "war"}},
    }
    assert running.client.post("/v1/events", json=event).status_code == 202
    assert running.service.items.flush()
    answer = running.client.post("/v1/rank", json=BODY).json()
    after = by_score(answer)
    assert answer["degraded"] == []
    assert abs(after["7"] - before["7"]) > 1e-4
    assert {i for i in ITEMS if abs(after[i] - before[i]) > 1e-6} == {"7"}
    assert "year" in triton.asked[-1][1]
