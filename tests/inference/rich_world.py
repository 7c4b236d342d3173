"""A shop with every kind of feature, and models of it that nobody trained: what they score is sharp and arbitrary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.config import Config
from engine.data.encoder import FeatureEncoder
from engine.data.prepare import Prepared, prepare
from engine.item_side import ItemSide
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from engine.training.calibration import Calibration

ITEMS = [f"Güter/{n}·☕" if n % 3 else f"item {n}" for n in range(120)]
USERS = [f"u{n}" if n % 2 else f"Ünal {n}" for n in range(30)]
BRANDS = ["acme", "日本", "zeta", ""]
TAGS = ["new", "sale", "größe XL", "red", "blue"]
FEATURES: list[dict[str, Any]] = [
    {"name": "user_id", "side": "user"},
    {"name": "age", "side": "user", "kind": "numeric"},
    {"name": "likes", "side": "user", "kind": "multi", "max_length": 4},
    {"name": "hour", "side": "context", "kind": "numeric", "transform": "bins", "bins": 6},
    {"name": "load", "side": "context", "kind": "numeric"},
    {"name": "item_id"},
    {"name": "brand"},
    {"name": "tags", "kind": "multi", "max_length": 3},
    {"name": "price", "kind": "numeric", "transform": "log"},
    {"name": "weight", "kind": "numeric"},
    {"name": "year", "kind": "numeric", "transform": "bins", "bins": 8},
    {"name": "history", "kind": "sequence", "of": "item_id", "max_length": 12},
    {"name": "brands", "kind": "sequence", "of": "brand", "max_length": 12},
]
CALIBRATION = {
    "click": Calibration("platt", np.array([0, 1], np.float32), np.array([-1, 1], np.float32), 2.0),
    "buy": Calibration(),
}


def config_of(folder: Path, features: Sequence[dict[str, Any]] = FEATURES, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "name": "shop",
            "data": {
                "source": {name: str(folder / f"{name}.parquet") for name in ("interactions", "items", "users")},
                "labels": {"click": {"column": "click"}, "buy": {"column": "buy"}},
                "split": {"by": "time", "validation": 0.1, "test": 0.1},
            },
            "features": list(features),
            "embedding": {"name": "full", "dim": 8},
            "interest": {"name": "din"},
            "ranker": {"name": "mlp", "options": {"hidden": [16]}},
            "training": {"threads": 1},
            **sections,
        }
    )


def write_shop(folder: Path) -> None:
    """600 rows; a tenth of the items never occurs."""
    rng = np.random.default_rng(2)
    n, items = 600, len(ITEMS)
    log = {
        "user_id": [USERS[k] for k in rng.integers(0, len(USERS), n)],
        "item_id": [ITEMS[k] for k in rng.integers(0, items - 12, n)],
        "timestamp": 1_700_000_000 + np.arange(n),
        "hour": rng.integers(0, 24, n).astype(float),
        "load": rng.normal(3, 2, n),
        "click": rng.integers(0, 2, n),
        "buy": (rng.random(n) < 0.2).astype(int),
    }
    things = {
        "item_id": ITEMS,
        "brand": [BRANDS[k] for k in rng.integers(0, len(BRANDS), items)],
        "tags": [[TAGS[t] for t in rng.integers(0, len(TAGS), rng.integers(0, 5))] for _ in ITEMS],
        "price": np.where(rng.random(items) < 0.1, np.nan, rng.gamma(2, 20, items)),
        "weight": rng.normal(5, 1, items),
        "year": rng.integers(1990, 2024, items).astype(float),
    }
    people = {
        "user_id": USERS,
        "age": rng.integers(16, 80, len(USERS)).astype(float),
        "likes": [[TAGS[t] for t in rng.integers(0, len(TAGS), rng.integers(0, 4))] for _ in USERS],
    }
    for name, columns in {"interactions": log, "items": things, "users": people}.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def prepared_shop(folder: Path, plugins: Plugins) -> Prepared:
    write_shop(folder)
    return prepare(config_of(folder), plugins, cache=folder / "cache")


def sharp_model(config: Config, prepared: Prepared, plugins: Plugins) -> RankingModel:
    """Frozen; weights so large that scores differ from request to request."""
    model = build_model(config, prepared.statistics, plugins, frozen=True)
    with torch.no_grad():
        for tensor in model.embedding.parameters():
            tensor.mul_(100.0)
        for tensor in model.ranker.parameters():
            tensor.mul_(2.0)
    model.settle()
    return model


@dataclass(frozen=True)
class Snapshot:
    """Something that scores, as a runtime reads it."""

    model: RankingModel
    items: ItemSide | None
    catalogue: ArrowCatalogue
    encoder: FeatureEncoder
    calibration: Mapping[str, Calibration]
    version: str = "v1"

    def wanted(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """The whole way from raw values, with no tensors between."""
        with torch.inference_mode():
            logits = self.model(self.encoder.encode_request(request, self.catalogue))
        return {task: self.calibration[task].apply(values.numpy()) for task, values in logits.items()}


def snapshot(config: Config, prepared: Prepared, plugins: Plugins, *, items_ahead: bool = True) -> Snapshot:
    model = sharp_model(config, prepared, plugins)
    side = ItemSide.make(model, prepared.encoder, prepared.catalogue, 1 << 30) if items_ahead else None
    assert (side is not None) is items_ahead
    calibration = {task: CALIBRATION[task] for task in config.schema_().tasks}
    return Snapshot(model, side, prepared.catalogue, prepared.encoder, calibration)


def random_request(rng: np.random.Generator, sizes: Sequence[int] = (0, 1, 2, 7, 40, 150)) -> ScoreRequest:
    """Any user, history and candidates: known and unknown, with features left out, given, or overridden."""

    def some(values: Sequence[Any], n: int, strange: float = 0.0) -> list[Any]:
        picked = [values[k] for k in rng.integers(0, len(values), n)]
        return [f"neu ☂ {rng.integers(99)}" if rng.random() < strange else value for value in picked]

    def maybe(share: float) -> bool:
        return bool(rng.random() < share)

    n = int(rng.choice(sizes))
    items = some(ITEMS, n, strange=0.1 if maybe(0.3) else 0.0)
    past = some(ITEMS, int(rng.choice([0, 1, 5, 12, 30])), strange=0.2 if maybe(0.3) else 0.0)
    user: dict[str, Any] = {"user_id": some(USERS, 1, 0.2)[0]} if maybe(0.8) else {}
    if maybe(0.6):
        user |= {"age": float(rng.integers(10, 90)), "likes": some(TAGS, int(rng.integers(0, 7)))}
    context = {"hour": float(rng.integers(0, 24)), "load": float(rng.normal())} if maybe(0.6) else {}
    given: dict[str, list[Any]] = {}
    if maybe(0.3):
        given["price"] = [None if rng.random() < 0.5 else float(rng.gamma(2, 30)) for _ in range(n)]
    if maybe(0.2):
        given["tags"] = [None if rng.random() < 0.5 else some(TAGS, int(rng.integers(0, 6))) for _ in range(n)]
    if maybe(0.2):
        given |= {"brand": some([*BRANDS, None], n, 0.1), "year": some([None, 1999, 1800.5], n)}
    history: dict[str, list[Any]] = {"item_id": past} if maybe(0.8) else {}
    if maybe(0.1):  # sequences by name, of events of their own
        history = {"history": past, "brands": some(BRANDS, len(past))}
    return ScoreRequest(user=user, history=history, items=items, item_features=given, context=context)
