"""The two towers learn planted tastes, are measured as a slow computation measures them, and train in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.prepare import prepare
from engine.errors import SchemaError
from engine.plugins import installed
from engine.retrieval import build_encoder_model, item_batch
from engine.training.recall import evaluate
from engine.training.retrieval import RetrievalResult, train_retrieval
from tests.retrieval import tastes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tastes")
    tastes.write(where)
    return where


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Any:
    return prepare(tastes.config(folder), installed(), cache=folder / "cache")


@pytest.fixture(scope="module")
def trained(folder: Path, prepared: Any) -> RetrievalResult:
    return train_retrieval(tastes.config(folder), prepared, plugins=installed())


def test_the_towers_find_more_than_popularity_does(trained: RetrievalResult) -> None:
    found = trained.metrics
    # a user's kind has 30 of 150 items; popularity cannot tell kinds apart, so its best 20 hold some 4 of them
    assert found["recall@20"] > 2 * found["popular/recall@20"]
    assert found["ndcg@10"] > 2 * found["popular/ndcg@10"]
    assert trained.item_vectors.shape == (tastes.ITEMS, 32)
    np.testing.assert_allclose(np.linalg.norm(trained.item_vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_figures_are_those_of_a_slow_count(prepared: Any, trained: RetrievalResult, split: str) -> None:
    """User by user: the best 20 by inner product without all that training holds of the user, against the positives."""
    had: dict[int, set[int]] = {}
    for batch in prepared.batches("train", 1000):
        for user, item in zip(batch.user_key.tolist(), batch.item_key.tolist(), strict=True):
            had.setdefault(user, set()).add(item)
    vector: dict[int, np.ndarray] = {}
    wanted: dict[int, set[int]] = {}
    for batch in prepared.batches(split, 7, positives_only=True):
        with torch.inference_mode():
            users = trained.model.users(batch).numpy()
        for row, (user, item) in enumerate(zip(batch.user_key.tolist(), batch.item_key.tolist(), strict=True)):
            vector.setdefault(user, users[row])
            if item not in had.get(user, set()):
                wanted.setdefault(user, set()).add(item)
    prints = prepared.catalogue.prints.tolist()
    recalls, reciprocal = [], []
    for user, items in wanted.items():
        scores = trained.item_vectors @ vector[user]
        ranked = [prints[i] for i in np.argsort(-scores) if prints[i] not in had.get(user, set())]
        recalls.append(len(items & set(ranked[:20])) / len(items))
        places = [n for n, item in enumerate(ranked[:50], 1) if item in items]
        reciprocal.append(1 / places[0] if places else 0.0)
    found = evaluate(trained.model, prepared, trained.item_vectors, split)
    assert found["users"] == len(wanted)
    assert found["recall@20"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert found["mrr"] == pytest.approx(np.mean(reciprocal), abs=1e-6)


def test_a_user_without_a_history_and_without_items_can_be_encoded(prepared: Any, trained: RetrievalResult) -> None:
    from engine.components import ScoreRequest

    batch = prepared.encoder.encode_request(ScoreRequest({}, {}, []), prepared.catalogue)
    with torch.inference_mode():
        assert torch.isfinite(trained.model.users(batch)).all()
        assert trained.model.items(item_batch(prepared.encoder, prepared.catalogue, np.array([-1]))).shape == (1, 32)


def test_weights_go_through_a_model_made_on_no_memory(folder: Path, prepared: Any, trained: RetrievalResult) -> None:
    """As a bundle is opened: built on the meta device, filled by assignment."""
    settings = tastes.config(folder)
    empty = build_encoder_model(settings, prepared.statistics, installed(), frozen=True, device="meta")
    empty.load_state_dict(trained.model.state_dict(), assign=True)
    assert evaluate(empty.eval(), prepared, trained.item_vectors) == {
        k: v for k, v in trained.metrics.items() if k not in ("loss", "epochs")
    }


def test_the_same_seed_gives_the_same_vectors(folder: Path, prepared: Any) -> None:
    settings = tastes.config(folder, epochs=1)
    first, second = (train_retrieval(settings, prepared, plugins=installed()) for _ in range(2))
    np.testing.assert_array_equal(first.item_vectors, second.item_vectors)


def test_a_configuration_without_the_section_is_refused_by_name(folder: Path, prepared: Any) -> None:
    settings = tastes.config(folder).model_copy(update={"retrieval": None})
    with pytest.raises(SchemaError, match="'tastes' has no section `retrieval`"):
        train_retrieval(settings, prepared, plugins=installed())


@pytest.mark.slow
def test_two_processes_train_one_encoder(folder: Path, prepared: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.retrieval.tastes", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "two.json").read_text())
    assert found["recall@20"] > 1.5 * found["popular/recall@20"]
    assert np.isfinite(np.load(folder / "two.npy")).all()
