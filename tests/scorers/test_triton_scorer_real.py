"""A real Triton with an exported bundle: the scorer finds it, scores as in process, and comes back to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle import Bundle
from engine.components import ScoreRequest
from plugins.scorers.triton import TritonScorer
from tests.scorers.conftest import REQUESTS, Rewrite, loaded
from tests.scorers.test_grown_catalogue import GIVEN, grown
from tests.triton_server import Launched


def request(n: int) -> ScoreRequest:
    return ScoreRequest({"user_id": "u3"}, {"item_id": ["4", "9"]}, [str(k) for k in range(n)])


def test_it_scores_as_in_process_and_finds_its_way_back(
    launched: Launched, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    """One Triton, as starting it takes seconds: what is asked, eight threads, a changed item, a promoted bundle, a
    server that stands still for a while."""
    from serving.triton.deploy import deploy
    from serving.triton.export import Wish, export

    export(Wish(tiny_bundle), launched.repository)
    launched.ready()
    options: dict[str, Any] = {"url": launched.state.url, "timeout_ms": 10_000, "load_timeout_s": 5}
    scorer = TritonScorer(TritonScorer.Options(**options, breaker={"failures": 1, "pause_s": 0.1}))
    try:
        scorer.load(tiny_bundle)
        inproc = loaded(tiny_bundle)
        asked = [*REQUESTS, request(2000), request(0), ScoreRequest({}, {}, ["東京", "7", "überall"])]
        for one in asked:
            same(scorer, inproc, one)

        wrong: list[Any] = []
        threads = [threading.Thread(target=_ask, args=(scorer, inproc, asked, wrong)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

        catalogue, _ = grown(tiny_bundle, {"new": GIVEN, "3": {"year": 1901}})
        for either in (scorer, inproc):
            either.items_changed(inproc.version, catalogue, None)
        same(scorer, inproc, ScoreRequest({"user_id": "u3"}, {"item_id": ["4"]}, ["new", "3", "5"]))

        other = rewrite(tiny_bundle, {})
        with launched.client() as client:
            deploy(Wish(other), launched.repository, client)
        assert scorer.score(request(3)).version == Bundle.open(tiny_bundle).version
        scorer.load(other)
        assert scorer.score(request(3)).version == "feedc0ffee00"
        assert scorer.score(request(3)).degraded == ()

        os.kill(launched.state.server.pid, signal.SIGSTOP)
        for _ in range(2):
            (why,) = scorer.score(replace(request(3), deadline=time.monotonic() + 2.0)).degraded
            assert why == "triton: deadline; scored by inproc"
        os.kill(launched.state.server.pid, signal.SIGCONT)
        until(lambda: not scorer.degraded())
        assert scorer.score(request(3)).degraded == ()
        assert scorer.score(request(3)).version == "feedc0ffee00"
    finally:
        scorer.close()


def same(scorer: Any, inproc: Any, one: ScoreRequest) -> None:
    found, wanted = scorer.score(one), inproc.score(one)
    np.testing.assert_allclose(found.tasks["liked"], wanted.tasks["liked"], atol=1e-5)
    assert (found.version, found.degraded) == (wanted.version, ())


def _ask(scorer: Any, inproc: Any, asked: list[ScoreRequest], wrong: list[Any]) -> None:
    try:
        for one in asked:
            same(scorer, inproc, one)
    except Exception as error:
        wrong.append(error)


def until(holds: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
