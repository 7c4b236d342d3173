"""A bundle to serve with the network of configs/movielens-100k.yaml, trained for one epoch on made-up ratings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.runs import CONFIGS
from engine.loading import load_config
from engine.plugins import installed
from engine.train_command import run_training

ITEMS, USERS, RATINGS = 4000, 1000, 60_000
_GENRES = ("action", "comedy", "crime", "drama", "family", "fantasy", "history", "music", "nature", "space")


def make_bundle(folder: Path, changed: Mapping[str, Any] | None = None) -> Path:
    """Draws the ratings from a fixed seed, trains, writes -> the bundle's path. changed: keys of the configuration.

    Users have 60 ratings on average, the catalogue 4,000 films of one to three genres: 2,000 candidates are distinct.
    """
    rng = np.random.default_rng(7)
    _write(folder / "ratings.parquet", _ratings(rng))
    genres = ["|".join(rng.choice(_GENRES, size=rng.integers(1, 4), replace=False)) for _ in range(ITEMS)]
    _write(
        folder / "items.parquet",
        {
            "item_id": [str(i) for i in range(ITEMS)],
            "title": [f"Film {i}" for i in range(ITEMS)],
            "year": rng.integers(1940, 2000, ITEMS),
            "genres": genres,
        },
    )
    _write(
        folder / "users.parquet",
        {
            "user_id": [str(u) for u in range(USERS)],
            "age": rng.integers(10, 80, USERS),
            "gender": rng.choice(["F", "M"], USERS),
            "occupation": rng.choice(["artist", "doctor", "farmer", "lawyer", "student"], USERS),
        },
    )
    plugins = installed()
    source = {
        "interactions": str(folder / "ratings.parquet"),
        "items": str(folder / "items.parquet"),
        "users": str(folder / "users.parquet"),
    }
    config = load_config(
        CONFIGS / "movielens-100k.yaml",
        {"data.dataset": None, "data.source": source, "training.epochs": 1, "training.threads": 1, **(changed or {})},
        plugins,
    )
    run_training(config, folder / "run", plugins=plugins)
    return folder / "run" / "bundle"


def _ratings(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Each film has a quality; the rating is its noisy image."""
    item = rng.integers(0, ITEMS, RATINGS)
    quality = rng.normal(0, 1, ITEMS)
    rating = np.clip(np.round(3.5 + quality[item] + rng.normal(0, 1, RATINGS)), 1, 5)
    return {
        "user_id": rng.integers(0, USERS, RATINGS).astype(str),
        "item_id": item.astype(str),
        "rating": rating.astype(np.int64),
        "timestamp": 1_700_000_000 + np.arange(RATINGS),
    }


def _write(path: Path, columns: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
