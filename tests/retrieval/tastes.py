"""200 users, 150 items of five kinds; a user likes one kind. `python -m tests.retrieval.tastes FOLDER` trains on it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config
from engine.data.prepare import prepare
from engine.plugins import installed
from engine.training.retrieval import train_retrieval

USERS, ITEMS, KINDS, ROWS = 200, 150, 5, 6000


def write(folder: Path, rows: int = ROWS, moved: int | None = None) -> None:
    """log.csv and items.csv: a user meets mostly items of the own kind, and likes nine of ten of those.

    moved: the row from which each user likes the next kind.
    """
    random = np.random.default_rng(3)
    with (folder / "items.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "kind"])
        out.writerows([item, f"kind {item % KINDS}"] for item in range(ITEMS))
    with (folder / "log.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["user_id", "item_id", "liked", "timestamp"])
        for second in range(rows):
            user = int(random.integers(USERS))
            item = int(random.integers(ITEMS))
            taste = (user + (moved is not None and second >= moved)) % KINDS
            if random.random() < 0.7:
                item = item - item % KINDS + taste
            likes = random.random() < (0.9 if item % KINDS == taste else 0.1)
            out.writerow([f"u{user}", item, int(likes), 1_700_000_000 + second])


def config(folder: Path, **retrieval: Any) -> Config:
    """To train a retrieval encoder on them."""
    return Config.model_validate(
        {
            **about(folder, validation=0.1, test=0.2),
            "embedding": {"name": "full", "dim": 8},
            "training": {"threads": 1},
            "retrieval": {"batch_size": 128, "epochs": 4, "lr": 0.05, "sampler": {"name": "mixed"}, **retrieval},
        }
    )


def about(folder: Path, *, validation: float, test: float) -> dict[str, Any]:
    """What a configuration says of the data."""
    return {
        "name": "tastes",
        "data": {
            "source": {"interactions": str(folder / "log.csv"), "items": str(folder / "items.csv")},
            "labels": {"like": {"column": "liked"}},
            "split": {"by": "time", "validation": validation, "test": test},
        },
        "features": [
            {"name": "user_id", "side": "user"},
            {"name": "item_id"},
            {"name": "kind"},
            {"name": "history", "kind": "sequence", "of": "item_id", "max_length": 20},
        ],
    }


def main(folder: Path) -> None:
    """One process of torchrun: the first writes what it found."""
    settings = config(folder, epochs=2)
    prepared = prepare(settings, installed(), cache=folder / "cache")
    result = train_retrieval(settings, prepared, plugins=installed())
    if result.metrics:
        np.save(folder / "two.npy", result.item_vectors)
        (folder / "two.json").write_text(json.dumps(result.metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
