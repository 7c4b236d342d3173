"""How tests configure a learner on the films' bundle: short windows, small batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.config import Config

LEARNING: dict[str, Any] = {
    "join": {"window_seconds": 20, "lateness_seconds": 5},
    "batch_size": 32,
    "chunk": 50,
    "checkpoint_events": 100_000,
}
PUBLISHING: dict[str, Any] = {
    "publish": {"interval_seconds": 0.001, "dense_seconds": 0, "bundle_seconds": 1000},
    "guard": {"logloss_ratio": None, "auc_drop": None, "calibration": None},
}
"""Deltas whenever there is something to say, whatever the model is worth."""


def configured(bundle: Path, **learning: Any) -> Config:
    """The bundle's configuration with a section `learning`: LEARNING, but for what is given."""
    whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json")
    return Config.model_validate({**whole, "learning": {**LEARNING, **learning}})


def changed(config: Config, **learning: Any) -> Config:
    """One with other values in its section `learning`."""
    whole = config.model_dump(mode="json")
    return Config.model_validate({**whole, "learning": {**whole["learning"], **learning}})
