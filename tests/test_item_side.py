"""Items' vectors made once give the scores that the whole way from raw values gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine import item_readers, recent
from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.data.prepared import Prepared
from engine.hashing import fingerprint
from engine.item_readers import ItemReaders
from engine.item_side import ItemSide
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from engine.recent import RecentVectors
from engine.streaming.deltas.apply import with_dense, with_own_dense
from engine.tables import FrozenTables
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


# -------------------------------------------------------------------------------------------------------- changes
class Opaque(nn.Module):
    """An embedding of which nothing is known but what it answers: the tables' vectors, scaled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return {
            name: JaggedTensor(values=found.values() * self.scale, lengths=found.lengths())
            for name, found in self.inner(ids).items()
        }


def test_an_embedding_without_tables_is_made_anew_as_a_whole(tiny_bundle: Path, plugins: Plugins) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = bundle.model(plugins)
    model.embedding = Opaque(model.embedding)
    model = with_own_dense(model)
    model.settle()
    side = ItemSide.make(model, bundle.encoder, bundle.catalogue, ROOM)
    assert side is not None
    asked_first = asked(["3", "7"], ["4"])
    before = side.logits(asked_first)
    second = with_dense(model, {"embedding.scale": torch.tensor(2.0)})
    grown = bundle.catalogue.updated(["new"], [{"genres": "war"}], bundle.encoder)
    later = side.with_model(second).renewed({}).with_items(grown, np.array([30]))
    assert later is not None
    request = asked(["3", "new", "7"], ["4", "new"])
    with torch.inference_mode():
        wanted = second(bundle.encoder.encode_request(request, grown))["liked"]
    quick, first = later.logits(request), side.logits(asked_first)
    assert quick is not None
    torch.testing.assert_close(quick["liked"], wanted, atol=1e-6, rtol=1e-6)
    assert before is not None
    assert first is not None
    torch.testing.assert_close(first["liked"], before["liked"])  # the first model is as it was
    assert not torch.allclose(wanted[[0, 2]], before["liked"], atol=1e-4)


def test_only_vectors_of_rows_that_were_written_are_forgotten(tiny_bundle: Path, plugins: Plugins) -> None:
    bundle = Bundle.open(tiny_bundle)
    embedding = bundle.model(plugins).embedding
    assert isinstance(embedding, FrozenTables)
    users = {name: np.array([fingerprint(name)]) for name in ("u1", "u2", "u3", "nobody", "no one")}
    made: list[str] = []

    def ask(kept: RecentVectors, user: str) -> None:
        def make(names: Sequence[str]) -> dict[str, torch.Tensor]:
            made.append(user)
            return {name: torch.zeros(1, 8) for name in names}

        kept.of({"user_id": users[user]}, make)

    first = RecentVectors()
    for user in [*users, "u1", "nobody"]:
        ask(first, user)
    assert made == list(users)
    rows = {u: int(embedding.placer({"user_id": torch.from_numpy(p)})["user_id"]) for u, p in users.items()}
    assert rows["nobody"] == rows["no one"] == 0  # ids that training did not see share a row
    later = first.without({"t_user_id": np.array([0, rows["u2"]]), "t_item_id": np.array([0])}, embedding)
    made.clear()
    for user in users:
        ask(later, user)
    assert made == ["u2", "nobody", "no one"]
    made.clear()
    ask(first, "u2")  # who began before goes on with what was kept
    assert made == []


@settings(deadline=None)
@given(st.data())
def test_items_that_read_a_row_are_found_like_by_looking_at_all(data: st.DataObject) -> None:
    numbers = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=30)
    pairs = data.draw(numbers)
    readers = ItemReaders.of("t", [split(pairs)])
    with patch.object(item_readers, "_FEW", data.draw(st.sampled_from([0, 10, 1024]))):
        for more in data.draw(st.lists(numbers, max_size=3)):
            pairs += more
            readers = readers.with_more(*split(more))
    rows = sorted(data.draw(st.sets(st.integers(0, 12))))
    found = readers.reading(np.array(rows, np.int64), 10)
    assert found.tolist() == sorted({item for row, item in pairs if row in rows})


def split(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r for r, _ in pairs], np.int64), np.array([i for _, i in pairs], np.int64)
