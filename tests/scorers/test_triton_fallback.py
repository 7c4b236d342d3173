"""Triton is slow, dead, wrong, and well again: the copy scores meanwhile, and each answer says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from engine.components import Scores
from engine.errors import BundleError, ScorerError
from plugins.scorers.triton import TritonScorer
from tests.scorers.conftest import Rewrite, loaded
from tests.scorers.triton_server import TritonLike, abort, request

Made = Callable[..., TritonScorer]
PATIENT = {"failures": 1000}
QUICK = {"failures": 2, "pause_s": 0.05}


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def answers(scorer: TritonScorer) -> tuple[str, ...]:
    return scorer.score(request(3)).degraded


# -------------------------------------------------------------------------------------------- wrong answers
def raw(task: int, values: np.ndarray) -> Callable[[Any], None]:
    """An answer with these numbers in place of an output's."""

    def spoil(response: Any) -> None:
        response.raw_output_contents[task] = values.tobytes()

    return spoil


def shape(response: Any) -> None:
    response.outputs[0].shape[:] = [3, 1]


def datatype(response: Any) -> None:
    response.outputs[0].datatype = "FP64"


def no_task(response: Any) -> None:
    response.outputs[0].name = "something else"


def no_version(response: Any) -> None:
    response.outputs[1].name = "something else"


def no_contents(response: Any) -> None:
    del response.raw_output_contents[:]


def strange_version(response: Any) -> None:
    response.raw_output_contents[1] = b"base+not.one"


def another(response: Any) -> None:
    response.raw_output_contents[1] = b"0123456789ab+1.5"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shape, "wrong answer"),
        (datatype, "wrong answer"),
        (no_task, "wrong answer"),
        (no_version, "wrong answer"),
        (no_contents, "wrong answer"),
        (strange_version, "wrong answer"),
        (raw(0, np.full(2, 0.5, np.float32)), "wrong answer"),
        (raw(0, np.array([0.5, np.nan, 0.5], np.float32)), "wrong answer"),
        (raw(0, np.array([0.5, np.inf, 0.5], np.float32)), "wrong answer"),
        (raw(0, np.array([0.5, -0.1, 0.5], np.float32)), "wrong answer"),
        (another, "other bundle"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_answer_never_becomes_scores(
    triton: TritonLike, made: Made, tiny_bundle: Path, spoil: Callable[[Any], None], reason: str
) -> None:
    wanted = loaded(tiny_bundle).score(request(3))
    copied, alone = made(fallback="inproc", breaker=PATIENT), made(breaker=PATIENT)
    triton.spoil = spoil
    found = copied.score(request(3))
    assert np.array_equal(found.tasks["liked"], wanted.tasks["liked"])
    assert (found.version, found.degraded) == (wanted.version, (f"triton: {reason}; scored by inproc",))
    with pytest.raises(ScorerError) as failed:
        alone.score(request(3))
    assert failed.value.reason == f"triton: {reason}"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.INTERNAL, "error"),
        (grpc.StatusCode.UNAVAILABLE, "unavailable"),
        (grpc.StatusCode.NOT_FOUND, "not deployed"),
        (grpc.StatusCode.INVALID_ARGUMENT, "refused"),
        (grpc.StatusCode.PERMISSION_DENIED, "denied"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "error"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_error_of_triton_is_named_in_short(
    triton: TritonLike, made: Made, code: grpc.StatusCode, reason: str
) -> None:
    scorer = made(fallback="inproc", breaker=PATIENT)
    triton.before = abort(code, "Stub process 'ranker_0_0' is not healthy")
    assert answers(scorer) == (f"triton: {reason}; scored by inproc",)
    triton.before = lambda context: None
    assert answers(scorer) == ()


# ---------------------------------------------------------------------------------------------- slow and dead
def test_a_slow_triton_leaves_the_copy_its_time(triton: TritonLike, made: Made) -> None:
    """Of a second 0.4 stay for a copy that takes so long, and what scored says that it was Triton's deadline."""
    scorer, held = made(fallback="inproc", breaker=PATIENT), threading.Event()
    assert scorer._copy is not None
    scorer._copy._pace = 0.4 / 1.5 / 53  # seconds an item; three items are 53 with what each request costs
    triton.before = lambda context: wait(held)
    found = scorer.score(request(3, deadline=time.monotonic() + 1.0))
    assert found.degraded == ("triton: deadline; scored by inproc",)
    assert triton.remaining[-1] < 0.7
    held.set()


def wait(held: threading.Event) -> None:
    held.wait(20)


def test_the_time_of_a_call_leaves_what_the_copy_takes(made: Made) -> None:
    """Of 100 ms 5 are nobody's. A copy that takes 20 ms gets 30, more while other calls may fail beside, half at most;
    one that takes longer than that cannot be in time, and gets nothing."""
    scorer = made(fallback="inproc")
    copy, counts = scorer._copy, scorer._link._counts
    assert copy is not None

    def share(beside: int) -> float:
        counts.calling = beside
        return scorer._time_for(50, time.monotonic() + 0.1)

    copy._pace = 0.02 / 100  # seconds an item; 50 items are 100 with what each request costs
    assert share(0) == pytest.approx(0.065, abs=0.01)
    assert share(1000) == pytest.approx(0.0475, abs=0.01)
    copy._pace = 0.2 / 100
    assert share(0) == pytest.approx(0.095, abs=0.01)


def test_a_copy_that_would_be_late_is_not_asked(triton: TritonLike, made: Made) -> None:
    """Then there is time for an answer without scores. It is tried again after a while: a slow spell may be over."""
    scorer = made(fallback="inproc", breaker=PATIENT)
    copy = scorer._copy
    assert copy is not None
    copy._pace = 1.0
    triton.stop()
    with pytest.raises(ScorerError) as failed:
        scorer.score(request(3, deadline=time.monotonic() + 1.0))
    assert failed.value.reason == "triton: unavailable"
    assert copy._pace < 1.0
    assert answers(scorer) == ("triton: unavailable; scored by inproc",)  # no deadline: whenever it is done


def test_after_some_failures_triton_is_left_alone_until_it_is_well(triton: TritonLike, made: Made) -> None:
    scorer = made(fallback="inproc", breaker=QUICK)
    probed = len(triton.asked)
    triton.spoil = raw(0, np.full(3, np.nan, np.float32))
    for _ in range(5):
        assert answers(scorer) == ("triton: wrong answer; scored by inproc",)
    until(lambda: len(triton.asked) > probed + 4)  # two requests; the rest are probes, which are spoiled too
    assert scorer.degraded() == ("triton: wrong answer; scored by inproc",)
    requests = [tensors for _, tensors in triton.asked if len(tensors["candidates"]) == 3]
    assert len(requests) == 2
    triton.spoil = lambda response: None
    until(lambda: not scorer.degraded())
    assert answers(scorer) == ()
    counted = {m.name: m.values for m in scorer.measures()}
    assert counted["scorer_fallbacks"] == {(): 5.0}
    assert counted["scorer_failures"] == {("wrong answer",): 2.0, ("not asked",): 3.0}
    assert counted["scorer_asked"] == {(): 1.0}


def test_a_server_that_dies_and_comes_back_is_found_again(triton: TritonLike, made: Made, tiny_bundle: Path) -> None:
    """Also as another version than before: the bundle decides, not the number."""
    copied, alone = made(fallback="inproc", breaker=QUICK), made(breaker=QUICK)
    triton.stop()
    for _ in range(3):
        assert answers(copied) == ("triton: unavailable; scored by inproc",)
        with pytest.raises(ScorerError, match=r"127\.0\.0\.1"):
            alone.score(request(3))
    copied.health()
    with pytest.raises(ScorerError):
        alone.health()
    triton.scorers = {"8": triton.scorers["3"]}
    triton.start()
    until(lambda: not (copied.degraded() or alone.degraded()))
    assert answers(copied) == answers(alone) == ()
    assert triton.asked[-1][0] == "8"


def test_a_server_begins_without_triton_if_it_has_a_copy(triton: TritonLike, made: Made, tiny_bundle: Path) -> None:
    triton.stop()
    scorer = made(fallback="inproc", breaker=QUICK, load_timeout_s=0.1)
    assert answers(scorer) == ("triton: unavailable; scored by inproc",)
    with pytest.raises(BundleError, match=r"does not serve tiny \w+ as 'tiny' \(unavailable: .*: is it up\?"):
        made(load_timeout_s=0.1)
    triton.start()
    until(lambda: not scorer.degraded())
    assert answers(scorer) == ()


def test_the_bundle_that_scores_is_read_again_while_triton_is_away(
    triton: TritonLike, made: Made, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    """A follower does that at a gap in the deltas. Another bundle cannot be taken then."""
    scorer = made(fallback="inproc", breaker=QUICK, load_timeout_s=0.1)
    triton.stop()
    scorer.load(tiny_bundle)
    assert answers(scorer) == ("triton: unavailable; scored by inproc",)
    with pytest.raises(BundleError, match="does not serve tiny feedc0ffee00"):
        scorer.load(rewrite(tiny_bundle, {}))
    assert answers(scorer) == ("triton: unavailable; scored by inproc",)


# ----------------------------------------------------------------------------------- what is not Triton's fault
def test_impatient_requests_do_not_part_the_others_from_triton(triton: TritonLike, made: Made) -> None:
    scorer = made(breaker={"failures": 1, "least_ms": 40, "pause_s": 600})
    held = threading.Event()
    triton.before = lambda context: wait(held)
    for ms in (1, 10, 30):
        with pytest.raises(ScorerError, match=r"DEADLINE|no time"):
            scorer.score(request(3, deadline=time.monotonic() + ms / 1e3))
    assert scorer.degraded() == ()
    with pytest.raises(ScorerError):
        scorer.score(request(3, deadline=time.monotonic() + 0.2))
    assert scorer.degraded() == ("triton: deadline",)
    held.set()


def test_a_request_that_is_refused_parts_nobody_from_triton(triton: TritonLike, made: Made) -> None:
    """Beyond twenty thousand items the model's server refuses; the copy may score them."""
    scorer = made(fallback="inproc", breaker={"failures": 1, "pause_s": 600})
    found = scorer.score(request(20_001))
    assert found.degraded == ("triton: refused; scored by inproc",)
    assert found.tasks["liked"].shape == (20_001,)
    assert answers(scorer) == ()


def test_a_replica_without_the_bundle_costs_one_more_call(triton: TritonLike, made: Made) -> None:
    """Behind one name several servers may stand, of which one is not as far as the others yet."""
    scorer = made(breaker={"failures": 1, "pause_s": 600})

    def every_other(context: Any) -> None:
        if len(triton.asked) % 2:
            context.abort(grpc.StatusCode.NOT_FOUND, "no version 3")

    triton.before = every_other
    assert answers(scorer) == ()
    assert len(triton.asked) == 2


@pytest.mark.parametrize(
    "absent",
    [(grpc.StatusCode.UNAVAILABLE, "is not at ready state"), (grpc.StatusCode.NOT_FOUND, "is not found")],
    ids=["leaving", "gone"],
)
def test_a_version_that_makes_way_for_another_of_its_bundle_costs_no_answer(
    triton: TritonLike, made: Made, absent: tuple[grpc.StatusCode, str]
) -> None:
    """As after a rollback: the bundle is deployed once more, and its older number goes. Many requests meet that."""
    scorer = made(breaker={"failures": 1, "pause_s": 600})
    wanted, before, gate = scorer.score(request(10)).tasks["liked"], triton.scorers, threading.Barrier(8)

    def ask(_: int) -> Scores:
        gate.wait(20)
        return scorer.score(request(10, deadline=time.monotonic() + 10))

    triton.scorers, triton.absent = {"4": before["3"]}, absent
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(ask, range(8))]
    finally:
        triton.scorers, triton.absent = before, (grpc.StatusCode.NOT_FOUND, "is not found")
    for answer in answers:
        np.testing.assert_array_equal(answer.tasks["liked"], wanted)
        assert answer.degraded == ()


def test_a_bundle_that_is_deployed_once_more_is_asked_for_at_its_newest_number(
    triton: TritonLike, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deltas reach that one only, and the older may stay for long."""
    monkeypatch.setattr("plugins.scorers.triton_link._NEWER_SECONDS", 0.05)
    scorer, before = made(), triton.scorers
    triton.scorers = {"3": before["3"], "4": before["3"]}
    try:

        def asked() -> str:
            triton.forget()
            assert scorer.score(request(3)).degraded == ()
            return next(version for version, tensors in triton.asked if "user_id" in tensors)

        until(lambda: asked() == "4")
    finally:
        triton.scorers = before


def test_a_bundle_that_is_gone_altogether_is_looked_for_within_the_requests_time(
    triton: TritonLike, made: Made
) -> None:
    """The versions that are left hang when they are asked for what they hold."""
    scorer, held, before = made(fallback="inproc"), threading.Event(), triton.scorers
    triton.before = lambda context: None if triton.asked[-1][0] == "3" else wait(held)
    try:
        triton.scorers = {"4": before["3"]}
        found = scorer.score(request(3, deadline=time.monotonic() + 1.0))
    finally:
        held.set()
        triton.scorers = before
    assert found.degraded == ("triton: not deployed; scored by inproc",)


def test_no_thread_and_no_connection_stay_behind(triton: TritonLike, made: Made) -> None:
    before = {t for t in threading.enumerate() if t.name == "plexrank-triton"}
    scorer = made()
    (watcher,) = {t for t in threading.enumerate() if t.name == "plexrank-triton"} - before
    scorer.close()
    assert not watcher.is_alive()
    with pytest.raises(ScorerError):
        scorer.score(request(1))
