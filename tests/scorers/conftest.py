"""A bundle, and the same bundle with other weights, written as any bundle is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.manifest import FileEntry, read_manifest, sealed
from engine.bundle.tensors import load_tensors, save_tensors
from engine.components import ScoreRequest
from engine.files import sha256
from engine.streaming.deltas.delta import Delta, TableRows
from plugins.scorers.inproc import InprocScorer
from plugins.scorers.triton import TritonScorer
from tests.conftest import FilmWorld


@pytest.fixture(scope="session")
def weights(tiny_bundle: Path) -> dict[str, Tensor]:
    return load_tensors(tiny_bundle / "model.safetensors")


@pytest.fixture(scope="session")
def unified_bundle(films: FilmWorld, plugins: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One table for all features, so small that every row is read by several: items, genres, users and years' bins."""
    from engine.train_command import run_training

    config = films.config(
        name="unified",
        embedding={"name": "unified", "dim": 8, "options": {"rows": 50}},
        interest={"name": "din"},
        training={"epochs": 1, "batch_size": 128, "threads": 1},
    )
    folder = tmp_path_factory.mktemp("unified")
    run_training(config, folder, plugins=plugins)
    return folder / "bundle"


def rewritten(bundle: Path, target: Path, changes: Mapping[str, Tensor]) -> Path:
    """A bundle like this one but for some weights; its files are checked like any bundle's."""
    shutil.copytree(bundle, target)
    file = target / "model.safetensors"
    state = load_tensors(file) | dict(changes)
    file.unlink()
    save_tensors(file, state)
    manifest = read_manifest(target).as_json()
    manifest["files"]["model.safetensors"] = FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()
    del manifest["digest"], manifest["format"]
    manifest["version"] = "feedc0ffee00"
    (target / "manifest.json").write_text(json.dumps(sealed(manifest).as_json()))
    return target


def loaded(bundle: Path, **options: Any) -> InprocScorer:
    scorer = InprocScorer(InprocScorer.Options(**options))
    scorer.load(bundle)
    return scorer


def delta(bundle: Path, sequence: int = 1, **changes: Any) -> Delta:
    opened = Bundle.open(bundle, verify=False)
    parts: dict[str, Any] = {
        "model": opened.name,
        "base": opened.version,
        "epoch": 0,
        "sequence": sequence,
        "created": 1.0,
        "newest": 1.0,
        "tables": {},
    }
    return Delta(**(parts | changes))


def drawn(table: Tensor, rows: list[int], seed: int = 0) -> TableRows:
    """Other values for these rows, as large as one likes them to be seen."""
    values = np.random.default_rng(seed).normal(size=(len(rows), table.shape[1])).astype(np.float32)
    return TableRows(np.array(sorted(rows), np.int64), values)


def written(state: Mapping[str, Tensor], tables: Mapping[str, TableRows]) -> dict[str, Tensor]:
    """The tables with these rows in place of theirs."""
    changed = {}
    for name, part in tables.items():
        table = state[f"embedding.weights.{name}"].clone()
        table[torch.from_numpy(part.rows)] = torch.from_numpy(part.values)
        changed[f"embedding.weights.{name}"] = table
    return changed


REQUESTS = [
    ScoreRequest(user={"user_id": user}, history={"item_id": past}, items=items, item_features=given)
    for user in ("u3", "u7", "nobody")
    for past in ([], ["4", "9"])
    for items, given in (
        ([str(n) for n in range(30)], {}),
        (["3", "never seen", "29"], {}),
        (["3", "4"], {"year": [1999, None]}),
    )
]


def same_scores(a: InprocScorer, b: InprocScorer, tolerance: float = 1e-6) -> None:
    for request in REQUESTS:
        found, wanted = a.score(request).tasks["liked"], b.score(request).tasks["liked"]
        np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=0)


Rewrite = Callable[[Path, Mapping[str, Tensor]], Path]


@pytest.fixture
def triton(tiny_bundle: Path) -> Iterator[Any]:
    """A server that speaks as Triton does (`TritonLike`), with the tiny bundle as version 3."""
    from tests.scorers.triton_server import TritonLike

    server = TritonLike("tiny", {"3": tiny_bundle})
    yield server
    server.stop()


@pytest.fixture
def made(triton: Any, tiny_bundle: Path) -> Iterator[Callable[..., TritonScorer]]:
    """Makes scorers of that server, with the tiny bundle loaded; closes them at the end."""
    scorers = []

    def make(bundle: Path | None = tiny_bundle, **options: Any) -> TritonScorer:
        defaults = {"url": triton.url, "fallback": "none", "load_timeout_s": 5, "timeout_ms": 5000}
        scorer = TritonScorer(TritonScorer.Options(**(defaults | options)))
        scorers.append(scorer)
        if bundle is not None:
            scorer.load(bundle)
        triton.forget()
        return scorer

    yield make
    for scorer in scorers:
        scorer.close()


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    def made(bundle: Path, changes: Mapping[str, Tensor]) -> Path:
        return rewritten(bundle, tmp_path / f"rewritten{len(list(tmp_path.iterdir()))}", changes)

    return made
