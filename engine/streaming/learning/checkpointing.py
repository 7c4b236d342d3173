"""A learner's checkpoint: weights, optimizers' state, join and positions in one folder, whole or not there at all."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.training import checkpoint
from engine.training.distributed import World

log = logging.getLogger("plexrank.learning")

ALONE = World(0, 1, torch.device("cpu"))
FORMAT = 1
_ARRAYS = "arrays/"


class Saved:
    """A whole checkpoint that is there to be taken up."""

    def __init__(self, found: checkpoint.Checkpoint) -> None:
        self.path = found.path
        self.state: dict[str, Any] = found.state["learner"]
        self._found = found

    def read_into(self, tensors: Mapping[str, Any]) -> None:
        """Fills the model's and the optimizers' tensors in place."""
        self._found.read_into(tensors)

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays by the names that they were written with, behind `prefix/`."""
        start = f"{_ARRAYS}{prefix}/"
        found = {}
        for member in self._found.index["members"]:
            with safe_open(self.path / member["file"], "pt") as file:
                for part in member["parts"]:
                    if part["tensor"].startswith(start):
                        found[part["tensor"].removeprefix(start)] = file.get_tensor(part["key"]).numpy()
        return found


def beside(root: Path) -> Saved | None:
    """The newest whole one, beside the learner that writes there; what is read of it may be gone the moment after.

    CheckpointError where none is whole.
    """
    while True:
        there = set(checkpoint.steps(root)) if root.is_dir() else set()
        try:
            found = checkpoint.latest(root, ALONE) if there else None
            return None if found is None or "learner" not in found.state else Saved(found)
        except (CheckpointError, OSError):
            if there == set(checkpoint.steps(root)):  # else newer ones have come, and these were removed
                raise


def positions_beside(root: Path) -> dict[int, int]:
    """partition -> next offset, as the newest checkpoint says, whose files are not looked at; {}: there is none now."""
    newest = max(checkpoint.steps(root), default=None) if root.is_dir() else None
    if newest is None:
        return {}
    try:
        index = json.loads((root / checkpoint.step_name(newest) / checkpoint.INDEX).read_bytes())
        return {int(p): int(offset) for p, offset in index["state"]["learner"]["positions"].items()}
    except (OSError, ValueError, KeyError):
        return {}


class LearnerCheckpoints:
    """The checkpoints of one learner in one folder; the writer of batch training's, so each file has its sha256.

    `failed` counts those that could not be written (a full disk): the ones before stay, and the next is tried.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self.failed = 0
        self.trouble: str | None = None
        self.saved_at: float | None = None  # monotonic
        self._next = 1 + max((c for c in checkpoint.steps(root)), default=0) if root.is_dir() else 1

    def newest(self) -> Saved | None:
        """The newest whole one; damaged ones are named in the log and skipped. CheckpointError where none is whole."""
        if not self.root.is_dir():
            return None
        for left in self.root.glob(".*.pending"):
            shutil.rmtree(left, ignore_errors=True)
        found = checkpoint.latest(self.root, ALONE)
        if found is None:
            return None
        if found.state.get("learner", {}).get("format") != FORMAT:
            raise CheckpointError(f"{found.path}: is no checkpoint of a learner of this version; start with --from")
        return Saved(found)

    def save(
        self, tensors: Mapping[str, Any], arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]
    ) -> Path | None:
        """Writes one and removes those that are no longer kept; None where the disk does not take it."""
        folder = self.root / checkpoint.step_name(self._next)
        every: dict[str, Any] = dict(tensors)
        for prefix, its in arrays.items():
            every |= {f"{_ARRAYS}{prefix}/{name}": _tensor(value) for name, value in its.items()}
        whole = {"step": self._next, "learner": {**state, "format": FORMAT}}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            checkpoint.write(folder, every, whole, ALONE)
        except (OSError, SafetensorError) as error:
            self.failed += 1
            self.trouble = str(error)
            log.error("%s: not written: %s; the one before stays, and it is tried again", folder, error)
            shutil.rmtree(folder.with_name(f".{folder.name}.pending"), ignore_errors=True)
            return None
        self._next += 1
        self.trouble, self.saved_at = None, time.monotonic()
        checkpoint.prune(self.root, self.keep, None, ALONE)
        return folder


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))
