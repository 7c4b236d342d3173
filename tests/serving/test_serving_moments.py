"""Moment hooks while serving: they hear and filter, and one that misbehaves is named, never felt."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.deadline import Deadline
from engine.hookspecs import hookimpl
from engine.pipeline import Query
from engine.plugins import Plugins
from serving.service import Service


@pytest.fixture
def world(models: Path, tmp_path: Path) -> Iterator[Any]:
    """A service whose plugin manager is its own, so that a test can register what it likes."""
    plugins = Plugins()
    service = Service.open(models / "tiny", None, tmp_path, plugins)
    yield SimpleNamespace(service=service, register=plugins.manager.register, plugins=plugins)
    service.close()


def recommend(world: Any, user: str = "u1", count: int = 30) -> Any:
    return world.service.recommend(Query("r1", Deadline(5.0), user), count, [])


def test_a_filter_leaves_out_items_and_several_are_anded(world: Any) -> None:
    class Even:
        @hookimpl
        def filter_candidates(self, items: Any) -> Any:
            return np.array([int(item) % 2 == 0 for item in items])

    class Small:
        @hookimpl
        def filter_candidates(self, user: str, items: Any, request: Any) -> Any:
            assert user == "nobody"
            assert request["count"] == 30
            return np.array([int(item) < 10 for item in items])

    world.register(Even(), name="even")
    world.register(Small(), name="small")
    answer = recommend(world, "nobody")
    assert sorted(answer.items) == ["0", "2", "4", "6", "8"]
    assert answer.degraded == []


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (lambda items: [True], "shape"),
        (lambda items: np.ones(len(items)), "shape"),
        (lambda items: None, "shape"),
        (lambda items: 1 / 0, "error"),
        (lambda items: time.sleep(0.5), "timeout"),
    ],
)
def test_a_filter_that_misbehaves_is_skipped_counted_and_named(world: Any, answers: Any, kind: str) -> None:
    class Odd:
        @hookimpl
        def filter_candidates(self, items: Any) -> Any:
            return answers(items)

    without = recommend(world, "nobody")
    world.register(Odd(), name="odd")
    answer = recommend(world, "nobody")
    assert answer.items == without.items
    assert answer.degraded == ["filter.odd: skipped"]
    assert world.plugins.errors["filter_candidates", "odd", kind] == 1


def test_plugins_hear_of_answers_and_events_and_cannot_hold_them_up(world: Any) -> None:
    heard: list[Any] = []
    both = threading.Event()

    class Listener:
        @hookimpl
        def on_response(self, response: Any) -> None:
            time.sleep(0.03)
            heard.append(response)
            both.set()

        @hookimpl
        def on_event(self, event: Any) -> None:
            heard.append(event)

    world.register(Listener(), name="listener")
    answer = recommend(world)
    assert both.wait(5)
    assert heard[0]["request_id"] == "r1"
    assert heard[0]["items"] == answer.items
    click = b'{"id":"h1","source":"t","type":"interaction","data":{"type":"click","user":"u","item":"1"}}'
    world.service.receive([click, click])
    assert [e["id"] for e in heard[1:]] == ["h1"], "a duplicate is not told"
