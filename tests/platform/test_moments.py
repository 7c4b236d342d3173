"""A moment hook that raises, stalls or answers nonsense is named, counted and skipped; the others are heard."""

from __future__ import annotations

import logging
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine import isolation
from engine.hookspecs import hookimpl
from engine.isolation import Failure, Isolated
from engine.plugins import Plugins


def listening(**named: dict[str, Any]) -> Plugins:
    """A manager with modules that hear moments: name -> {moment: function}."""
    plugins = Plugins([], budget_seconds=0.05)
    for name, hooks in named.items():
        module = ModuleType(name)
        for moment, function in hooks.items():
            setattr(module, moment, hookimpl(function))
        plugins.manager.register(module, name=name)
    return plugins


def test_answers_come_in_the_order_of_the_configuration() -> None:
    plugins = listening(a={"on_event": lambda event: "a"}, b={"on_event": lambda event: event["x"]})
    assert plugins.notify("on_event", event={"x": 7}) == ["a", 7]
    assert plugins.listens("on_event")
    assert not plugins.listens("on_response")


def test_a_hook_that_raises_is_named_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    def boom(event: object) -> None:
        raise ValueError("no such thing")

    plugins = listening(bad={"on_event": boom}, good={"on_event": lambda event: 1})
    with caplog.at_level(logging.WARNING):
        assert plugins.notify("on_event", event={}) == [1]
    assert plugins.errors == {("on_event", "bad", "error"): 1}
    assert caplog.messages == ["plugin bad failed in on_event and was skipped: ValueError: no such thing"]


def test_a_hook_that_ends_the_process_does_not() -> None:
    def leave(event: object) -> None:
        raise SystemExit(3)

    plugins = listening(bad={"on_event": leave})
    assert plugins.notify("on_event", event={}) == []
    assert plugins.errors["on_event", "bad", "error"] == 1


def test_a_hook_that_stalls_costs_its_budget_once_and_is_then_left_alone() -> None:
    gate, calls = threading.Event(), []

    def stall(event: object) -> None:
        calls.append(event)
        gate.wait(10)

    plugins = listening(slow={"on_event": stall}, good={"on_event": lambda event: 1})
    before = threading.active_count()
    for _ in range(200):
        assert plugins.notify("on_event", event={}) == [1]
    assert len(calls) == 1, "it was waited for once; the other times it was not even asked"
    assert threading.active_count() <= before + 2  # one for the stalled, one for the good
    assert plugins.errors == {("on_event", "slow", "timeout"): 1, ("on_event", "slow", "suspended"): 199}
    gate.set()


def test_one_that_stalled_once_is_heard_again() -> None:
    gate = threading.Event()
    plugins = listening(slow={"on_event": lambda event: gate.wait(10)})
    assert plugins.notify("on_event", event={}) == []
    gate.set()
    deadline = time.monotonic() + 5
    while not (answers := plugins.notify("on_event", event={})) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert answers == [True]


def test_failures_in_a_row_suspend_a_plugin_for_a_while() -> None:
    now, calls = [0.0], []

    def fail() -> None:
        calls.append(1)
        raise OSError("down")

    plugin = Isolated("bad", clock=lambda: now[0])
    for _ in range(isolation.FAILURES):
        with pytest.raises(Failure, match="down"):
            plugin.call(fail, {}, 1.0)
    with pytest.raises(Failure, match="failed 3 times in a row") as caught:
        plugin.call(fail, {}, 1.0)
    assert caught.value.kind == "suspended"
    assert plugin.suspended
    assert len(calls) == 3
    now[0] = isolation.PAUSE_SECONDS + 0.1
    assert plugin.call(lambda: "back", {}, 1.0) == "back"
    assert not plugin.suspended


def test_one_plugin_has_a_few_threads_however_many_ask() -> None:
    gate, plugin, kinds = threading.Event(), Isolated("slow"), []

    def ask() -> None:
        try:
            plugin.call(lambda: gate.wait(10), {}, 5.0)
            kinds.append("ok")
        except Failure as failure:
            kinds.append(failure.kind)

    callers = [threading.Thread(target=ask) for _ in range(20)]
    for caller in callers:
        caller.start()
    while len(kinds) < 20 - isolation.THREADS:
        time.sleep(0.001)
    gate.set()
    for caller in callers:
        caller.join()
    assert sorted(kinds) == ["busy"] * (20 - isolation.THREADS) + ["ok"] * isolation.THREADS


def test_filters_are_anded_and_nonsense_is_skipped() -> None:
    plugins = listening(
        odd={"filter_candidates": lambda items: np.array([i % 2 == 1 for i in range(len(items))])},
        big={"filter_candidates": lambda items: [len(i) > 1 for i in items]},
        short={"filter_candidates": lambda items: np.array([True])},
        floats={"filter_candidates": lambda items: np.zeros(len(items))},
        nothing={"filter_candidates": lambda items: None},
    )
    kept, failed = plugins.keep("u", ["a", "bb", "cc", "d"], {})
    assert kept.tolist() == [False, True, False, False]
    assert failed == ["short", "floats", "nothing"]
    assert plugins.errors["filter_candidates", "short", "shape"] == 1


def test_without_filters_all_candidates_stay() -> None:
    kept, failed = listening().keep("u", ["a", "b"], {})
    assert (kept.tolist(), kept.dtype, failed) == ([True, True], np.bool_, [])


def test_a_filter_of_nonsense_is_suspended_after_a_few() -> None:
    plugins = listening(bad={"filter_candidates": lambda items: "x"})
    for _ in range(5):
        plugins.keep("u", ["a"], {})
    assert plugins.errors["filter_candidates", "bad", "shape"] == isolation.FAILURES
    assert plugins.errors["filter_candidates", "bad", "suspended"] == 5 - isolation.FAILURES


def test_hook_calls_can_be_traced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLEXRANK_TRACE_PLUGINS", "1")
    listening(a={"on_event": lambda event: 1}).notify("on_event", event={})
    assert "plexrank trace: on_event a: ok " in capsys.readouterr().err
