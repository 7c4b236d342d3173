"""When a learner's checkpoint is due, and what follows from one that is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config_learning import LearningConfig
from engine.streaming.learning.checkpointing import LearnerCheckpoints
from engine.streaming.learning.learner_metrics import LearnerMetrics
from engine.streaming.learning.monitoring import PositionsCopy

if TYPE_CHECKING:
    from engine.plugins import Plugins


class Saves:
    """Of one learner. events: that were read when it began."""

    def __init__(
        self,
        checkpoints: LearnerCheckpoints,
        learning: LearningConfig,
        copy: PositionsCopy,
        plugins: Plugins,
        metrics: LearnerMetrics,
        events: int,
    ) -> None:
        self._checkpoints, self._learning, self._copy = checkpoints, learning, copy
        self._plugins, self._metrics = plugins, metrics
        self._events, self._at = events, time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since one was tried last."""
        return time.monotonic() - self._at

    def due(self, events: int) -> bool:
        """After so many events, or else after so long."""
        if self._learning.checkpoint_events is not None:
            return events - self._events >= self._learning.checkpoint_events
        return self.age >= self._learning.checkpoint_seconds

    def write(
        self,
        tensors: Mapping[str, Any],
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        state: Mapping[str, Any],
        *,
        since: float,
        positions: Mapping[int, int],
        step: int,
        events: int,
    ) -> Path | None:
        """A checkpoint, then the broker's copy of its positions; None where the disk does not take it.

        since: when it was begun, monotonic.
        """
        path = self._checkpoints.save(tensors, arrays, state)
        self._events, self._at = events, time.monotonic()
        self._metrics.checkpoint.observe(self._at - since)
        if path is None:
            self._metrics.checkpoints_failed.inc()
            return None
        self._copy.write(positions)
        if self._plugins.listens("on_checkpoint"):
            self._plugins.notify("on_checkpoint", path=path, step=step)
        return path
