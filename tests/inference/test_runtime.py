"""Requests that come as tensors get the scores that the scorer in process gives to the same requests."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.bundle.write import write_bundle
from engine.components import ScoreRequest
from engine.data.prepare import Prepared
from engine.errors import PlexrankError, RequestError
from engine.inference.runtime import Runtime
from engine.inference.tensors import encode
from engine.plugins import Plugins
from engine.streaming.deltas.apply import TABLES
from engine.streaming.deltas.delta import Delta, TableRows
from plugins.scorers.inproc import InprocScorer
from tests.inference.rich_world import (
    CALIBRATION,
    FEATURES,
    ITEMS,
    USERS,
    Snapshot,
    config_of,
    random_request,
    sharp_model,
    snapshot,
)
from tests.platform.support import distribution, with_builtins

ROOT = Path(__file__).parents[2]
EMBEDDINGS: list[dict[str, Any]] = [
    {"name": "full", "dim": 8},
    {"name": "hashing", "dim": 8},
    {"name": "unified", "dim": 8},
]
INTERESTS = [None, {"name": "mean"}, {"name": "attention"}, {"name": "din"}]
RANKERS: list[dict[str, Any]] = [
    {"name": "mlp", "options": {"hidden": [16]}},
    {"name": "deepfm"},
    {"name": "dlrm"},
    {"name": "dcnv2"},
    {"name": "mmoe"},
]
TOLERANCE = 1e-5


def told(now: Snapshot, request: ScoreRequest, *, items_apart: bool = False) -> dict[str, np.ndarray]:
    return encode(request, now.encoder, now.catalogue, items_apart=items_apart)


def agrees(answer: dict[str, np.ndarray] | PlexrankError, wanted: dict[str, np.ndarray], version: str = "v1") -> None:
    assert not isinstance(answer, PlexrankError), answer
    assert [*answer] == [*wanted, "version"]
    assert answer["version"].tobytes().decode() == version
    for task, values in wanted.items():
        assert answer[task].dtype == np.float32
        np.testing.assert_allclose(answer[task], values, atol=TOLERANCE, rtol=0, strict=True)


@pytest.fixture(scope="module")
def bundle(shop_folder: Path, shop: Prepared, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(shop_folder)
    model = sharp_model(config, shop, plugins)
    path = tmp_path_factory.mktemp("bundles") / "shop"
    write_bundle(
        path, config=config, model=model, prepared=shop, calibration=CALIBRATION, metrics={}, with_users=False,
        plugins=plugins,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("megabytes", [256, 0], ids=["items' vectors ahead", "all a request"])
def test_the_scorer_in_process_answers_tensors_as_it_scores(bundle: Path, megabytes: int) -> None:
    """Three hundred requests of any kind, alone and several together."""
    scorer = InprocScorer(InprocScorer.Options(item_vectors_mb=megabytes))
    scorer.load(bundle)
    opened, now = Bundle.open(bundle), Runtime(scorer._now)
    rng = np.random.default_rng(8)
    spread = []
    for size in itertools.cycle([1, 2, 5, 12]):
        requests = [random_request(rng) for _ in range(size)]
        wanted = [scorer.score(request).tasks for request in requests]
        for items_apart in (False, True):
            asked = [encode(r, opened.encoder, opened.catalogue, items_apart=items_apart) for r in requests]
            for answer, its in zip(now.score(asked), wanted, strict=True):
                agrees(answer, its, opened.version)
            agrees(scorer.infer(asked[0]), wanted[0], opened.version)
        spread += [its["click"] for its in wanted]
        if len(spread) > 300:
            break
    assert np.concatenate(spread).std() > 0.05  # scores that differ: equality says something


def test_two_thousand_candidates_and_none(ranked: Snapshot) -> None:
    rng = np.random.default_rng(1)
    requests = [random_request(rng, sizes=[n]) for n in (2000, 0, 2000, 1)]
    answers = Runtime(lambda: ranked).score([told(ranked, request) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        agrees(answer, ranked.wanted(request))


@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=lambda e: e["name"])
@pytest.mark.parametrize("interest", INTERESTS, ids=lambda i: i["name"] if i else "none")
def test_every_embedding_interest_and_ranker(
    shop_folder: Path, shop: Prepared, plugins: Plugins, embedding: dict[str, Any], interest: dict[str, Any] | None
) -> None:
    rng = np.random.default_rng(4)
    for ranker in RANKERS:
        config = config_of(shop_folder, embedding=embedding, interest=interest, ranker=ranker)
        now = snapshot(config, shop, plugins)
        requests = [random_request(rng, sizes=[1, 7, 40, 300]) for _ in range(6)]
        answers = Runtime(lambda now=now: now).score(
            [told(now, r, items_apart=n % 2 == 1) for n, r in enumerate(requests)]
        )
        for request, answer in zip(requests, answers, strict=True):
            agrees(answer, now.wanted(request))
        assert np.concatenate([now.wanted(request)["click"] for request in requests]).std() > 0.005


def test_a_request_alone_has_the_very_bits_of_the_scorer(bundle: Path) -> None:
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(bundle)
    opened = Bundle.open(bundle)
    for n in (1, 30, 120):
        request = ScoreRequest({"user_id": USERS[3], "age": 30.0}, {"item_id": ITEMS[:9]}, ITEMS[:n])
        answer = scorer.infer(encode(request, opened.encoder, opened.catalogue, items_apart=False))
        for task, wanted in scorer.score(request).tasks.items():
            assert np.array_equal(answer[task], wanted)


def test_only_item_features_that_are_overridden_travel(ranked: Snapshot) -> None:
    request = ScoreRequest({}, {}, ITEMS[:3], item_features={"price": [1.0, None, 3.0], "tags": [None, [], ["new"]]})
    tensors = told(ranked, request)
    assert {name for name in tensors if name.partition(".")[0] in ("brand", "price", "tags", "weight", "year")} == {
        "price",
        "tags",
        "tags.lengths",
    }
    plain = ScoreRequest({}, {}, ITEMS[:3])
    answer = Runtime(lambda: ranked).infer(tensors)
    agrees(answer, ranked.wanted(request))
    assert np.abs(answer["click"] - ranked.wanted(plain)["click"]).max() > 1e-3


def test_no_tensor_is_empty_but_for_the_candidates(ranked: Snapshot) -> None:
    nothing = ScoreRequest({"likes": []}, {"item_id": []}, ITEMS[:2], item_features={"tags": [[], []]})
    tensors = told(ranked, nothing, items_apart=True)
    assert all(len(values) for values in tensors.values())
    assert "likes" not in tensors
    assert "history" not in tensors
    assert "tags" not in tensors
    assert tensors["tags.lengths"].tolist() == [0, 0]
    agrees(Runtime(lambda: ranked).infer(tensors), ranked.wanted(nothing))
    assert told(ranked, ScoreRequest({}, {}, []))["candidates"].shape == (0,)


def test_candidates_alone_are_a_request(ranked: Snapshot) -> None:
    tensors = {"candidates": told(ranked, ScoreRequest({}, {}, ITEMS[:5]))["candidates"]}
    agrees(Runtime(lambda: ranked).infer(tensors), ranked.wanted(ScoreRequest({}, {}, ITEMS[:5])))


def test_torch_tensors_and_read_only_arrays_are_taken_as_they_come(ranked: Snapshot) -> None:
    rng = np.random.default_rng(6)
    request = random_request(rng, sizes=[40])
    tensors = told(ranked, request, items_apart=True)
    over_a_wire = {name: np.frombuffer(values.tobytes(), values.dtype) for name, values in tensors.items()}
    in_torch = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    for given in (over_a_wire, in_torch):
        agrees(Runtime(lambda: ranked).infer(given), ranked.wanted(request))


# ---------------------------------------------------------------------------------------------------- what changes
def test_items_that_only_the_asking_side_knows_come_with_all_their_features(bundle: Path) -> None:
    """New and changed items, as candidates and in the history, for a runtime over the bundle's own catalogue."""
    opened = Bundle.open(bundle)
    said = [{"brand": "zeta", "tags": ["sale"], "price": 3.5}, {"year": 1991.0, "tags": None}]
    grown = opened.catalogue.updated(["neu ☂", ITEMS[5]], said, opened.encoder)
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(bundle)
    request = ScoreRequest({}, {"item_id": ["neu ☂", *ITEMS[3:9]]}, ["neu ☂", *ITEMS[:20]])
    before = scorer.score(request).tasks["click"]
    asked = encode(request, opened.encoder, grown, items_apart=True)
    answer = scorer.infer(asked)
    scorer.items_changed(opened.version, grown, grown.rows(["neu ☂", ITEMS[5]]))
    wanted = scorer.score(request).tasks
    assert np.abs(wanted["click"] - before).max() > 1e-3
    agrees(answer, wanted, opened.version)
    agrees(scorer.infer(asked), wanted, opened.version)
    agrees(scorer.infer(encode(request, opened.encoder, grown, items_apart=False)), wanted, opened.version)


def test_a_delta_reaches_tensors_and_its_version_goes_with_them(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    scorer = InprocScorer(InprocScorer.Options())
    scorer.load(bundle)
    rng = np.random.default_rng(12)
    request = ScoreRequest({"user_id": USERS[1]}, {"item_id": ITEMS[:6]}, ITEMS)
    tensors = encode(request, opened.encoder, opened.catalogue, items_apart=False)
    before = scorer.infer(tensors)
    tables = {
        name.removeprefix(TABLES): TableRows(np.arange(len(t)), rng.normal(size=t.shape).astype(np.float32))
        for name, t in opened.frozen_tensors().items()
        if name.startswith(TABLES)
    }
    delta = Delta(opened.name, opened.version, epoch=1, sequence=1, created=0.0, newest=0.0, tables=tables)
    scorer.apply(delta)
    agrees(scorer.infer(tensors), scorer.score(request).tasks, delta.version)
    assert np.abs(scorer.infer(tensors)["click"] - before["click"]).max() > 1e-2


# -------------------------------------------------------------------------------------------------- what is wrong
def test_a_request_that_does_not_fit_fails_alone(ranked: Snapshot) -> None:
    rng = np.random.default_rng(3)
    good = [random_request(rng, sizes=[7, 40]) for _ in range(4)]
    asked = [told(ranked, request) for request in good]
    asked.insert(2, asked[0] | {"candidates": asked[0]["candidates"].astype(np.int32)})
    asked.insert(0, {})
    answers = Runtime(lambda: ranked).score(asked)
    for place in (0, 3):
        assert isinstance(answers.pop(0 if place == 0 else 2), RequestError)
    for request, answer in zip(good, answers, strict=True):
        agrees(answer, ranked.wanted(request))


def test_a_request_that_the_model_chokes_on_fails_alone(ranked: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ranker that cannot take seven items: the others are scored, and only it says why."""
    ranker = ranked.model.ranker
    forward = ranker.forward

    def choosy(inputs: Any) -> dict[str, torch.Tensor]:
        if len(inputs.dense) in (7, 7 + 4 + 5):
            raise ValueError("seven of them")
        found: dict[str, torch.Tensor] = forward(inputs)
        return found

    monkeypatch.setattr(ranker, "forward", choosy)
    requests = [ScoreRequest({}, {"item_id": ITEMS[:3]}, ITEMS[:n]) for n in (4, 7, 5)]
    first, second, third = Runtime(lambda: ranked).score([told(ranked, request) for request in requests])
    agrees(first, ranked.wanted(requests[0]))
    assert isinstance(second, PlexrankError)
    assert "ValueError: seven of them" in str(second)
    agrees(third, ranked.wanted(requests[2]))


def test_a_score_that_is_no_number_is_an_error_of_its_request(
    ranked: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ranked.model.ranker
    forward = ranker.forward

    def lost(inputs: Any) -> dict[str, torch.Tensor]:
        found = {task: values.clone() for task, values in forward(inputs).items()}
        found["buy"][-1] = float("nan")
        return found

    monkeypatch.setattr(ranker, "forward", lost)
    first, second = Runtime(lambda: ranked).score([told(ranked, ScoreRequest({}, {}, ITEMS[:3]))] * 2)
    assert isinstance(first, dict)
    assert str(second) == "task 'buy': a score is not finite"


def test_sequences_of_different_lengths_are_refused(ranked: Snapshot) -> None:
    tensors = told(ranked, ScoreRequest({}, {"item_id": ITEMS[:4]}, ITEMS[:2]))
    with pytest.raises(RequestError, match=r"must be of one length.*'history' 4, 'brands' 3"):
        Runtime(lambda: ranked).infer(tensors | {"brands": tensors["brands"][:3]})
    with pytest.raises(RequestError, match="'history' 4, 'brands' 0"):
        Runtime(lambda: ranked).infer({n: v for n, v in tensors.items() if n != "brands"})


def test_as_many_items_as_are_allowed(ranked: Snapshot) -> None:
    runtime = Runtime(lambda: ranked, most_items=5)
    assert len(runtime.infer(told(ranked, ScoreRequest({}, {}, ITEMS[:5])))["click"]) == 5
    with pytest.raises(RequestError, match="'candidates': 6 items in one request, at most 5"):
        runtime.infer(told(ranked, ScoreRequest({}, {}, ITEMS[:6])))


# -------------------------------------------------------------------------------------------------- third parties
EMBEDDING = """
    import torch
    from torch import nn
    from torchrec.sparse.jagged_tensor import JaggedTensor

    from engine.components import EmbeddingMethod, Memory, PluginOptions
    from engine.hookspecs import hookimpl


    class Waves(EmbeddingMethod):
        name = "waves"

        def __init__(self, features, options, statistics):
            super().__init__(features, options, statistics)
            spaces = sorted({f.space for f in features})
            self.place = {f.name: spaces.index(f.space) for f in features}
            self.scale = nn.Parameter(torch.rand(len(spaces), features[0].dim))

        @property
        def widths(self):
            return {f.name: f.dim for f in self.features}

        def forward(self, ids):
            parts = zip(ids.keys(), ids.values().split(ids.length_per_key()), ids.lengths().split(ids.stride_per_key()))
            return {
                name: JaggedTensor(torch.sin((v % 1009).float()[:, None] * self.scale[self.place[name]]), lengths=n)
                for name, v, n in parts
            }

        def memory_bytes(self):
            return Memory(self.scale.nbytes, self.scale.nbytes)

        def touched_rows(self, ids):
            return {}

        def freeze(self):
            return self


    @hookimpl
    def embeddings():
        return [Waves]
"""


def test_an_embedding_and_an_interest_of_other_packages(
    shop_folder: Path, shop: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example package's interest, which knows no settled form, over an embedding that has no tables."""
    recency = (ROOT / "examples/plugin/acme_plexrank/recency.py").read_text("utf-8")
    entries = {"interests.recency": "acme_recency", "embeddings.waves": "acme_waves"}
    monkeypatch.syspath_prepend(tmp_path)
    points = distribution(tmp_path, "acme", entries, {"acme_recency": recency, "acme_waves": EMBEDDING})
    plugins = with_builtins(points)
    one = [f for f in FEATURES if f["name"] != "brands"]
    rng = np.random.default_rng(9)
    for features, embedding in ((FEATURES, "full"), (one, "waves"), (FEATURES, "waves")):
        config = config_of(shop_folder, features, interest={"name": "recency"}, embedding={"name": embedding, "dim": 8})
        now = snapshot(config, shop, plugins)
        requests = [random_request(rng, sizes=[1, 7, 40]) for _ in range(8)]
        answers = Runtime(lambda now=now: now).score([told(now, request) for request in requests])
        for request, answer in zip(requests, answers, strict=True):
            agrees(answer, now.wanted(request))
