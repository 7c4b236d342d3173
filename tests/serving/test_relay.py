"""Stages in one thread; a late one is left behind, the request goes on, and nothing leaks."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from engine.deadline import Deadline, Late, Workers
from engine.relay import STUCK, Flow, Relay, Stage


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def relay() -> Any:
    made = Relay(2)
    yield made
    made.close()


def test_a_request_that_goes_well_stays_in_one_thread(relay: Relay) -> None:
    def flow() -> Flow:
        names = [threading.current_thread().name]
        for _ in range(5):
            names.append((yield Stage("part", soon(), lambda: threading.current_thread().name)))
        return names

    names = relay.begin(flow()).result(5)
    assert len(set(names)) == 1
    assert names[0].startswith("plexrank-request")


def test_a_stage_gets_its_arguments_and_its_errors_reach_the_flow(relay: Relay) -> None:
    def flow() -> Flow:
        found = yield Stage("sum", soon(), max, (3, 7))
        try:
            yield Stage("bad", soon(), int, ("x",))
        except ValueError as error:
            return found, str(error)

    assert relay.begin(flow()).result(5) == (7, "invalid literal for int() with base 10: 'x'")


def test_a_stalled_stage_is_left_behind_in_time_and_the_request_goes_on(relay: Relay) -> None:
    release = threading.Event()

    def flow() -> Flow:
        until = soon(0.1)
        try:
            yield Stage("stalls", until, release.wait, (30,))
        except Late:
            early = time.monotonic() < until
        return early, (yield Stage("next", soon(), lambda: "answer"))

    assert relay.begin(flow()).result(20) == (False, "answer")
    assert relay.stuck("stalls") == 1, "the answer is there and the stage is not"
    release.set()
    for _ in range(100):
        if relay.stuck("stalls") == 0:
            break
        time.sleep(0.02)
    assert relay.stuck("stalls") == 0


def test_a_stage_whose_time_is_up_is_not_begun(relay: Relay) -> None:
    called: list[int] = []

    def flow() -> Flow:
        try:
            yield Stage("part", time.monotonic() - 0.001, called.append, (1,))
        except Late:
            return "late"

    assert relay.begin(flow()).result(5) == "late"
    assert called == []


def test_a_part_that_hangs_for_ever_holds_only_a_few_threads(relay: Relay) -> None:
    release = threading.Event()

    def flow() -> Flow:
        try:
            yield Stage("hangs", soon(0.05), release.wait, (30,))
        except Late:
            return (yield Stage("other", soon(), lambda: "fine"))

    before = threading.active_count()
    futures = [relay.begin(flow()) for _ in range(40)]
    assert [future.result(10) for future in futures] == ["fine"] * 40
    assert relay.stuck("hangs") <= STUCK + 1
    assert threading.active_count() - before <= 2 + STUCK + 1
    release.set()
    deadline = soon(5)
    while relay.stuck("hangs") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert relay.stuck("hangs") == 0


def test_a_stage_that_ends_while_the_watcher_looks_has_one_owner() -> None:
    relay = Relay(4)
    rng_times = [0.0, 0.002, 0.004, 0.006]

    def flow(n: int) -> Flow:
        outcomes = []
        for k in range(6):
            try:
                outcomes.append((yield Stage(f"p{n}-{k}", soon(0.003), time.sleep, (rng_times[(n + k) % 4],))))
            except Late:
                outcomes.append("late")
        return outcomes

    futures = [relay.begin(flow(n)) for n in range(200)]
    for future in futures:
        outcomes = future.result(20)
        assert len(outcomes) == 6
        assert set(outcomes) <= {None, "late"}
    relay.close()


def test_an_exit_of_a_stage_does_not_end_the_thread(relay: Relay) -> None:
    def flow() -> Flow:
        try:
            yield Stage("rude", soon(), exit, (3,))
        except RuntimeError as error:
            return str(error)

    assert relay.begin(flow()).result(5) == "SystemExit: 3"
    assert relay.begin(flow()).result(5) == "SystemExit: 3"


def test_what_the_flow_raises_is_the_outcome(relay: Relay) -> None:
    def flow() -> Flow:
        yield Stage("part", soon(), lambda: None)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        relay.begin(flow()).result(5)


def test_shares_of_a_deadline_are_counted_from_its_beginning() -> None:
    deadline = Deadline(2.0, begin=100.0)
    assert (deadline.at(0.0), deadline.at(0.25), deadline.at(1.0), deadline.end) == (100.0, 100.5, 102.0, 102.0)


def test_workers_run_at_once_what_they_have_threads_for_and_end_when_closed() -> None:
    workers = Workers("test", 3)
    barrier = threading.Barrier(3)
    futures = [workers.begin(barrier.wait, 5) for _ in range(3)]
    assert sorted(future.result(5) for future in futures) == [0, 1, 2]
    hold = threading.Event()
    busy = [workers.begin(hold.wait, 5) for _ in range(3)]
    queued = workers.begin(lambda: 1)
    assert queued.cancel()
    hold.set()
    assert all(future.result(5) for future in busy)
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.begin(lambda: 1)
