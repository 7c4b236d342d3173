"""Who may score now, and who is told at once that it would be too late."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from engine.deadline import Late
from engine.turns import FIXED, Turns


def soon(seconds: float) -> float:
    return time.monotonic() + seconds


def test_while_nobody_is_ahead_everybody_is_let_in() -> None:
    turns = Turns(1)
    turns.pace = 10.0  # a slow spell must not be believed for ever
    assert turns.take(1000, soon(0.001))
    with turns.of(1000, soon(0.001)):
        pass


def test_a_request_is_let_in_if_it_and_those_ahead_can_be_scored_in_time() -> None:
    turns = Turns(1)
    turns.pace = 1.0
    assert turns.take(50, soon(150))  # 100 s of work
    assert not turns.take(50, soon(150)), "200 s of work"
    assert turns.take(50, soon(300)), "200 s and a margin"
    turns.give_back(50)
    turns.give_back(50)
    assert turns.take(50, soon(150))


def test_two_places_are_twice_as_quick() -> None:
    turns = Turns(2)
    turns.pace = 1.0
    assert turns.take(50, soon(220))
    assert turns.take(50, soon(220)), "half of 100 s ahead, then 100 s, and a margin"


def test_nobody_waits_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1)
    turns.pace = 1.0
    waits: list[float] = []
    with turns.of(50, soon(1000)):
        monkeypatch.setattr(turns._freed, "wait", waits.append)
        with pytest.raises(Late), turns.of(50, soon(200)):
            pass
        assert waits == [], "200 s of work and a margin do not fit"
        turns.pace = 0.0  # nothing is known: worth a try
        with pytest.raises(Late), turns.of(50, soon(100)):
            pass
        assert len(waits) == 1
        assert 0 < waits[0] <= 100
    with turns.of(50, soon(0.01)):  # those who left are not counted
        pass


def test_who_waits_scores_when_the_place_is_free() -> None:
    turns = Turns(1)
    order: list[str] = []
    inside = threading.Event()

    def score(name: str) -> None:
        with turns.of(1, soon(5)):
            order.append(name)
            inside.set()
            time.sleep(0.05)

    first = threading.Thread(target=score, args=("first",))
    first.start()
    assert inside.wait(5)
    score("second")
    first.join()
    assert order == ["first", "second"]


def test_one_stall_is_not_a_new_pace() -> None:
    turns = Turns(1)
    turns.pace = 1e-6
    with turns.of(0, soon(5)):
        time.sleep(0.05)  # a thousand times the pace
    assert turns.pace == pytest.approx(1.3e-6)
    turns, begin = Turns(1), time.monotonic()
    with turns.of(0, soon(5)):
        time.sleep(0.05)
    assert 0.05 / FIXED <= turns.pace <= (time.monotonic() - begin) / FIXED, "the first is all that is known"


def test_a_server_that_is_behind_refuses_at_once_and_says_when_to_come_back(server: Any) -> None:
    turns = server.service.pipeline._turns
    pace, turns.pace = turns.pace, 1.0
    assert turns.take(100, soon(1))
    try:
        body = {"user": "1", "items": ["1", "2"]}
        refused = [server.client.post("/v1/rank", json=body), server.client.post("/v1/recommend", json={"user": "1"})]
        for answer in refused:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "too many requests are ahead" in answer.json()["detail"]
        assert "plexrank_shed_total 2.0" in server.client.get("/metrics").text
    finally:
        turns.give_back(100)
        turns.pace = pace
    assert server.client.post("/v1/rank", json=body | {"timeout_ms": 5000}).json()["degraded"] == []
    assert turns._taken == 0
