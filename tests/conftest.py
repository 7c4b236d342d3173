"""A small world of films that any test may train on: tastes by genre, everything written by hand or by a fixed seed."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config
from engine.plugins import Plugins


@dataclass(frozen=True)
class FilmWorld:
    """40 users, 30 films of three genres, 2,000 ratings; four of five films of a user's own genre are liked."""

    folder: Path

    def config(self, **changes: Any) -> Config:
        """The configuration; `changes` replace whole sections."""
        sections: dict[str, Any] = {
            "name": "films",
            "data": {
                "source": {
                    "interactions": str(self.folder / "ratings.csv"),
                    "items": str(self.folder / "films.csv"),
                },
                "title": "title",
                "labels": {"liked": {"column": "rating", "at_least": 4}},
                "split": {"by": "time", "validation": 0.15, "test": 0.15},
            },
            "features": [
                {"name": "user_id", "side": "user"},
                {"name": "item_id"},
                {"name": "genres", "kind": "multi"},
                {"name": "year", "kind": "numeric"},
                {"name": "history", "kind": "sequence", "of": "item_id", "max_length": 10},
            ],
            "embedding": {"name": "full", "dim": 8},
            "interest": {"name": "mean"},
            "ranker": {"name": "mlp", "options": {"hidden": [16]}},
            "training": {"epochs": 2, "batch_size": 128, "threads": 1},
        }
        return Config.model_validate(sections | changes)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> FilmWorld:
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(11)
    genre_names = ("crime", "comedy", "war")
    genre = np.arange(30) % 3
    with (folder / "films.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["item_id", "title", "genres", "year"])
        for item in range(30):
            out.writerow([item, f"Film <{item}> & co", f"{genre_names[genre[item]]}|all", 1960 + item])
    with (folder / "ratings.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["user_id", "item_id", "rating", "timestamp"])
        for second in range(2000):
            user, item = int(rng.integers(40)), int(rng.integers(30))
            likes = rng.random() < (0.8 if genre[item] == user % 3 else 0.2)
            out.writerow([f"u{user}", item, 5 if likes else 2, 1_700_000_000 + second])
    return FilmWorld(folder)


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins()


@pytest.fixture(scope="session")
def film_data(films: FilmWorld, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The films, prepared."""
    from engine.data.prepare import prepare

    return prepare(films.config(), plugins, cache=tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def tiny_bundle(films: FilmWorld, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle of the films: DIN, a two-tower encoder, users; two epochs, seconds. Copy it to change it."""
    from engine.train_command import run_training

    serving = {
        "sources": [{"name": "retriever", "k": 20}, {"name": "popular", "k": 20}, {"name": "recent", "k": 10}],
        "limits": {"timeout_ms": 2000},
    }
    config = films.config(
        interest={"name": "din"}, retrieval={"epochs": 2, "batch_size": 128}, serving=serving, name="tiny"
    )
    folder = tmp_path_factory.mktemp("models")
    run_training(config, folder / "run", plugins=plugins)
    (folder / "run" / "bundle").rename(folder / "tiny")
    return folder / "tiny"
