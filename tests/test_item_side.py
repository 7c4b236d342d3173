"""Items' vectors made once give the scores that the whole way from raw values gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import recent
from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.data.prepared import Prepared
from engine.item_side import ItemSide
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from plugins.scorers.inproc import InprocScorer
from tests.conftest import FilmWorld

ROOM = 1 << 30


def asked(items: list[str], past: list[str], **more: Any) -> ScoreRequest:
    return ScoreRequest(user={"user_id": "u3"}, history={"item_id": past}, items=items, **more)


def whole_way(model: RankingModel, prepared: Prepared, request: ScoreRequest) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(prepared.encoder.encode_request(request, prepared.catalogue))["liked"]
        return logits


@pytest.mark.parametrize("embedding", ["full", "hashing", "unified"])
@pytest.mark.parametrize("interest", [None, {"name": "mean"}, {"name": "din"}])
def test_scores_are_those_of_the_whole_way(
    films: FilmWorld, film_data: Prepared, plugins: Plugins, embedding: str, interest: dict[str, Any] | None
) -> None:
    sections = {"embedding": {"name": embedding}, "interest": interest}
    model = build_model(films.config(**sections), film_data.statistics, plugins, frozen=True)
    side = ItemSide.make(model, film_data.encoder, film_data.catalogue, ROOM)
    assert side is not None
    for past in ([], ["4"], [str(n) for n in range(25)]):  # more than the history's ten are cut
        request = asked(["3", "7", "3", "29", "0"], past)
        quick = side.logits(request)
        assert quick is not None
        torch.testing.assert_close(quick["liked"], whole_way(model, film_data, request), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "request_",
    [
        asked(["3", "never seen"], []),
        asked(["3"], ["never seen"]),
        asked(["3"], [], item_features={"year": [1999]}),
        ScoreRequest(user={}, history={"history": ["4"]}, items=["3"]),
        asked([], ["4"]),
    ],
    ids=["an unknown item", "an unknown past item", "features given", "a sequence by name", "no items"],
)
def test_what_the_catalogue_alone_does_not_answer_goes_the_whole_way(
    tiny_bundle: Path, plugins: Plugins, request_: ScoreRequest
) -> None:
    bundle = Bundle.open(tiny_bundle)
    side = ItemSide.make(bundle.model(plugins).eval(), bundle.encoder, bundle.catalogue, ROOM)
    assert side is not None
    assert side.logits(request_) is None
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(tiny_bundle)
    assert len(scorer.score(request_).tasks["liked"]) == len(request_.items)


def test_a_large_catalogue_is_not_computed_ahead(tiny_bundle: Path, plugins: Plugins) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = bundle.model(plugins).eval()
    side = ItemSide.make(model, bundle.encoder, bundle.catalogue, ROOM)
    assert side is not None
    assert side.nbytes == len(bundle.catalogue) * 4 * (8 + 8 + 1)  # item_id, genres, year; the history reads item_id's
    assert ItemSide.make(model, bundle.encoder, bundle.catalogue, 0) is None


def test_the_scorer_answers_the_same_with_and_without(tiny_bundle: Path) -> None:
    with_, without = (InprocScorer(InprocScorer.Options(item_vectors_mb=mb)) for mb in (256, 0))
    request = asked([str(n) for n in range(30)], ["1", "2", "4"])
    for scorer in (with_, without):
        scorer.load(tiny_bundle)
    a, b = with_.score(request).tasks["liked"], without.score(request).tasks["liked"]
    assert abs(a - b).max() < 1e-6


def test_vectors_of_recent_users_are_kept_and_those_of_new_ones_made(
    tiny_bundle: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "MOST", 2)
    bundle = Bundle.open(tiny_bundle)
    model = bundle.model(plugins).eval()
    side = ItemSide.make(model, bundle.encoder, bundle.catalogue, ROOM)
    assert side is not None
    for user in ("u1", "u2", "u1", "u3", "u4", "nobody", "u5", "u1"):
        request = ScoreRequest(user={"user_id": user}, history={"item_id": ["4"]}, items=["3", "7"])
        with torch.inference_mode():
            wanted = model(bundle.encoder.encode_request(request, bundle.catalogue))["liked"]
        quick = side.logits(request)
        assert quick is not None
        torch.testing.assert_close(quick["liked"], wanted, atol=1e-6, rtol=1e-6)
