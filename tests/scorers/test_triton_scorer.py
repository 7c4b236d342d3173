"""Scores through a server that speaks as Triton does: as in process, whatever is asked, by the version asked for."""

from __future__ import annotations

import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import testing
from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.errors import BundleError, PluginError, RequestError, SchemaError
from engine.hashing import fingerprints
from engine.inference.tensors import encode
from engine.streaming.deltas.delta import Delta
from plugins.scorers.triton import TritonScorer
from tests.scorers.conftest import REQUESTS, Rewrite, delta, drawn, loaded
from tests.scorers.test_grown_catalogue import GIVEN, grown
from tests.scorers.triton_server import TritonLike, request


# ---------------------------------------------------------------------------------------------------- scores
def test_scores_are_those_of_the_scorer_in_process(triton: TritonLike, made: Any, tiny_bundle: Path) -> None:
    scorer, inproc = made(), loaded(tiny_bundle)
    for asked in [*REQUESTS, request(2500), ScoreRequest({}, {}, ["überall", "東京"])]:
        found, wanted = scorer.score(asked), inproc.score(asked)
        np.testing.assert_allclose(found.tasks["liked"], wanted.tasks["liked"], atol=1e-6)
        assert (found.model, found.version, found.degraded) == (wanted.model, wanted.version, ())
    assert {version for version, _ in triton.asked} == {"3"}
    assert len(triton.asked) == len(REQUESTS) + 2


def test_ids_go_as_fingerprints_and_items_without_features(triton: TritonLike, made: Any) -> None:
    made().score(request(5))
    ((_, tensors),) = triton.asked
    assert set(tensors) == {"candidates", "user_id", "history"}
    assert np.array_equal(tensors["candidates"], fingerprints(["0", "1", "2", "3", "4"]))
    assert np.array_equal(tensors["history"], fingerprints(["4", "9"]))


def test_a_request_for_no_items_does_not_travel(triton: TritonLike, made: Any) -> None:
    scorer = made()
    scores = scorer.score(request(0))
    assert scores.tasks["liked"].shape == (0,)
    assert scores.tasks["liked"].dtype == np.float32
    assert scores.version == scorer.version
    assert triton.asked == []


def test_eight_threads_share_one_connection(triton: TritonLike, made: Any, tiny_bundle: Path) -> None:
    scorer, inproc = made(), loaded(tiny_bundle)
    wanted = {n: inproc.score(request(n)).tasks["liked"] for n in (1, 5, 17, 30)}
    wrong: list[Any] = []

    def ask(k: int) -> None:
        for _ in range(25):
            n = (1, 5, 17, 30)[k % 4]
            found = scorer.score(request(n)).tasks["liked"]
            if not np.allclose(found, wanted[n], atol=1e-6):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(triton.asked) == 200


def test_the_deadline_travels_with_the_request(triton: TritonLike, made: Any) -> None:
    """What is left of it, less what the way back needs; without one, the option's. gRPC rounds up."""
    scorer = made()
    scorer.score(request(3, deadline=time.monotonic() + 20))
    scorer.score(request(3))
    assert 5.5 < triton.remaining[0] < 20.5
    assert 0 < triton.remaining[1] < 5.5


def test_a_value_that_cannot_be_read_is_the_requests_fault(triton: TritonLike, made: Any) -> None:
    with pytest.raises(SchemaError, match="year"):
        made().score(request(1, item_features={"year": ["long ago"]}))
    assert triton.asked == []


def test_tensors_are_answered_as_the_scorer_in_process_does(triton: TritonLike, made: Any, tiny_bundle: Path) -> None:
    scorer, inproc, opened = made(), loaded(tiny_bundle), Bundle.open(tiny_bundle)
    tensors = encode(request(20), opened.encoder, opened.catalogue, items_apart=True)
    found, wanted = scorer.infer(tensors), inproc.infer(tensors)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(found["liked"], wanted["liked"], atol=1e-6)
    assert bytes(found["version"]) == opened.version.encode()
    assert scorer.signature == inproc.signature
    with pytest.raises(RequestError, match="tensor 'candidates' is missing"):
        scorer.infer({})
    assert scorer.infer({"candidates": np.empty(0, np.int64)})["liked"].shape == (0,)
    assert len(triton.asked) == 1


# ------------------------------------------------------------------------------------------------- versions
def test_it_asks_the_version_that_holds_its_bundle(
    triton: TritonLike, made: Any, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    """Triton may serve several; after a load it asks another, and a bundle that is not there is refused."""
    other = rewrite(tiny_bundle, {})
    triton.scorers["4"] = loaded(other)
    scorer = made()
    scorer.score(request(2))
    assert triton.asked[-1][0] == "3"
    scorer.load(other)
    assert scorer.score(request(2)).version == "feedc0ffee00"
    assert triton.asked[-1][0] == "4"
    del triton.scorers["3"]
    refused = made(None, load_timeout_s=0.1)
    with pytest.raises(BundleError, match=r"plexrank triton deploy .*tiny REPOSITORY --url 127\.0\.0\.1"):
        refused.load(tiny_bundle)
    with pytest.raises(BundleError, match="version 4 of 'tiny' holds feedc0ffee00"):
        refused.load(tiny_bundle)


def test_a_bundle_that_triton_does_not_get_leaves_the_one_before(
    triton: TritonLike, made: Any, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    scorer = made(load_timeout_s=0.1, fallback="inproc")
    before = scorer.score(request(9))
    with pytest.raises(BundleError, match="does not serve tiny feedc0ffee00"):
        scorer.load(rewrite(tiny_bundle, {}))
    after = scorer.score(request(9))
    assert np.array_equal(before.tasks["liked"], after.tasks["liked"])
    assert (after.version, after.degraded) == (before.version, ())


def test_a_bundle_that_is_on_its_way_is_waited_for(
    triton: TritonLike, made: Any, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    scorer, other = made(load_timeout_s=30), rewrite(tiny_bundle, {})
    deployed = loaded(other)
    threading.Timer(0.5, lambda: triton.scorers.update({"4": deployed})).start()
    scorer.load(other)
    assert scorer.score(request(2)).version == "feedc0ffee00"


def test_another_name_in_triton(triton: TritonLike, made: Any, tiny_bundle: Path) -> None:
    triton.model = "films"
    with pytest.raises(BundleError, match=r"as 'tiny'.*unknown model: 'tiny'"):
        made(load_timeout_s=0.1)
    assert made(model="films").score(request(2)).model == "tiny"


def test_replicas_may_number_a_bundle_each_in_its_way(
    triton: TritonLike, made: Any, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    """One of them began later, when other bundles had been and gone. Each call goes to the next replica."""
    scorer, other, turn = made(), loaded(rewrite(tiny_bundle, {})), count()
    ours = triton.scorers["3"]
    numbered = [{"2": other, "3": ours}, {"1": ours}, {"3": other, "4": ours}]

    def next_replica(context: Any) -> None:
        triton.scorers = numbered[next(turn) % len(numbered)]

    triton.before = next_replica
    for _ in range(30):
        assert scorer.score(request(2)).version == ours.version


# -------------------------------------------------------------------------------------------- deltas and items
class Beside(TritonScorer):
    """With the process beside Triton that brings deltas and bundles to it."""

    server: TritonLike

    def load(self, bundle: Path) -> None:
        super().load(bundle)
        self.server.scorers["3"].load(bundle)

    def apply(self, delta: Delta) -> None:
        super().apply(delta)
        self.server.scorers["3"].apply(delta)


def test_it_keeps_the_contract_of_scorers(triton: TritonLike, tiny_bundle: Path) -> None:
    class Ours(Beside):
        """Over the server of this test."""

        server = triton

    testing.check_scorer(Ours, {"url": triton.url, "load_timeout_s": 0.1, "timeout_ms": 5000}, bundle=tiny_bundle)


def test_the_copy_follows_deltas_and_the_answer_says_what_scored(
    triton: TritonLike, made: Any, unified_bundle: Path
) -> None:
    """Triton behind the deltas says so itself; its copy stands where this side is."""
    triton.scorers, triton.model = {"1": loaded(unified_bundle)}, "unified"
    scorer = made(unified_bundle, fallback="inproc")
    table = triton.scorers["1"]._now().model.state_dict()["embedding.weights.unified"]
    step = delta(unified_bundle, epoch=1, tables={"unified": drawn(table, list(range(50)))})
    base = scorer.version
    scorer.apply(step)
    assert scorer.version == f"{base}+1.1"
    assert scorer.score(request(5)).version == base
    triton.stop()
    inproc = loaded(unified_bundle)
    inproc.apply(step)
    found = scorer.score(request(5))
    assert found.version == f"{base}+1.1"
    assert np.array_equal(found.tasks["liked"], inproc.score(request(5)).tasks["liked"])
    assert found.degraded == ("triton: unavailable; scored by inproc",)


@pytest.mark.parametrize("anew", [False, True], ids=["step by step", "all at once"])
def test_new_and_changed_items_travel_with_their_features(
    triton: TritonLike, made: Any, tiny_bundle: Path, anew: bool
) -> None:
    """Triton keeps to the bundle's catalogue; a request that holds such an item brings all items' features."""
    scorer, inproc = made(), loaded(tiny_bundle)
    batches: list[dict[str, Any]] = [{"new": GIVEN}, {"3": {"year": 1901}, "newer": {"genres": "crime"}}]
    version = Bundle.open(tiny_bundle).version
    for n in range(len(batches)):
        catalogue, rows = grown(tiny_bundle, *batches[: n + 1])
        for one in (scorer, inproc):
            if not anew:
                one.items_changed(version, catalogue, rows[-1])
    if anew:
        scorer.items_changed(version, catalogue, None)
        inproc.items_changed(version, catalogue, None)
    for items in (["new", "5"], ["3", "5"], ["newer", "unknown"]):
        asked = ScoreRequest({"user_id": "u3"}, {"item_id": ["4"]}, items)
        wanted = inproc.score(asked).tasks["liked"]
        np.testing.assert_allclose(scorer.score(asked).tasks["liked"], wanted, atol=1e-6)
        assert {"genres", "genres.lengths", "year"} <= set(triton.asked[-1][1])
    scorer.score(request(3))
    assert "year" not in triton.asked[-1][1]
    scorer.load(tiny_bundle)  # the same bundle again: what was said of its items holds on
    scorer.score(ScoreRequest({}, {}, ["new"]))
    assert "year" in triton.asked[-1][1]
    scorer.items_changed("0123456789ab", Bundle.open(tiny_bundle).catalogue, None)  # of another bundle: left alone
    scorer.score(ScoreRequest({}, {}, ["new"]))
    assert "year" in triton.asked[-1][1]
    with pytest.raises(TypeError, match="ArrowCatalogue"):
        scorer.items_changed(version, object(), None)


def test_tensors_of_new_and_changed_items_are_answered_as_in_process(
    triton: TritonLike, made: Any, tiny_bundle: Path
) -> None:
    """Triton does not know what happened to them, this side does. What a request says itself stays."""
    scorer, inproc, opened = made(), loaded(tiny_bundle), Bundle.open(tiny_bundle)
    catalogue, _ = grown(tiny_bundle, {"new": GIVEN, "3": {"year": 1901}})
    for one in (scorer, inproc):
        one.items_changed(opened.version, catalogue, None)
    for items, given in ((["new", "3", "5"], {}), (["3", "5"], {"year": [1950, 1960]}), (["5", "6"], {})):
        asked = ScoreRequest({"user_id": "u3"}, {"item_id": ["4"]}, items, given)
        tensors = encode(asked, opened.encoder, opened.catalogue, items_apart=False)
        wanted = inproc.infer(tensors)["liked"]
        np.testing.assert_allclose(scorer.infer(tensors)["liked"], wanted, atol=1e-6)
    assert "year" not in triton.asked[-1][1]


def test_items_do_not_wait_for_a_bundle_that_is_on_its_way(
    triton: TritonLike, made: Any, tiny_bundle: Path, rewrite: Rewrite
) -> None:
    scorer, other = made(load_timeout_s=60), rewrite(tiny_bundle, {})
    loading = threading.Thread(target=scorer.load, args=(other,))
    loading.start()
    try:
        until = time.monotonic() + 20
        while not any(version == "3" for version, _ in triton.asked):  # it is looked for
            assert time.monotonic() < until
            time.sleep(0.01)
        catalogue, _ = grown(tiny_bundle, {"new": GIVEN})
        told = threading.Thread(target=scorer.items_changed, args=(scorer.version, catalogue, None))
        told.start()
        told.join(20)
        assert not told.is_alive()
        assert loading.is_alive()
        scorer.score(ScoreRequest({}, {}, ["new"]))
        assert "year" in triton.asked[-1][1]
    finally:
        triton.scorers["4"] = loaded(other)
        loading.join(60)
    assert scorer.version == "feedc0ffee00"


# ------------------------------------------------------------------------------------------------ explaining
def test_the_copy_explains_and_without_one_it_is_said(made: Any, tiny_bundle: Path) -> None:
    wanted = loaded(tiny_bundle).explain(request(4))
    found = made(fallback="inproc").explain(request(4))
    assert {name: w.tolist() for name, w in found.items()} == {name: w.tolist() for name, w in wanted.items()}
    with pytest.raises(RequestError, match="fallback: inproc") as refused:
        made().explain(request(4))
    assert refused.value.status == 409


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    monkeypatch.delitem(sys.modules, "plugins.scorers.triton_client", raising=False)
    with pytest.raises(PluginError, match=r"pip install 'plexrank\[triton\]'"):
        TritonScorer(TritonScorer.Options())
