"""The smallest bundles that open: a manifest that is sealed, and one file of weights. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.bundle.manifest import FileEntry, sealed
from engine.config import Config
from engine.files import sha256

A, B, C = "a" * 12, "b" * 12, "c" * 12


def small_config(name: str = "films") -> Config:
    return Config.model_validate(
        {
            "name": name,
            "data": {
                "source": {"interactions": "ratings.csv"},
                "labels": {"liked": {"column": "rating", "at_least": 4}},
            },
            "features": [{"name": "user_id", "side": "user"}, {"name": "item_id"}],
        }
    )


def write_small(
    path: Path, version: str, *, name: str = "films", weight: float = 0.0, created: str = "2025-01-01", **fields
) -> Path:
    """A bundle of a version by name; `fields` go into its manifest (metrics, parent)."""
    path.mkdir(parents=True)
    save_file({"weight": torch.full((4, 2), weight)}, path / "model.safetensors")
    file = path / "model.safetensors"
    config = small_config(name)
    manifest = sealed(
        {
            "name": name,
            "version": version,
            "created": created,
            "config": config.model_dump(mode="json"),
            "schema": config.schema_().model_dump(mode="json"),
            "seed": 1,
            "plugins": [],
            "libraries": {},
            "metrics": {"auc": 0.7, "logloss": 0.5},
            "files": {file.name: FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()},
            **fields,
        }
    )
    (path / "manifest.json").write_text(json.dumps(manifest.as_json()))
    return path
