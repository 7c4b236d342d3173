"""What is decided how long after a ranking: for each task when it is presumed negative, and when its window ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.config_learning import JoinConfig
from engine.errors import CheckpointError, ConfigError
from engine.hashing import fingerprints

MOST_TASKS = 31


class Stages:
    """A ranking goes through G stages, each of which ends some seconds after it.

    ends float64 [G]: ascending. closing, presuming int32 [G]: tasks whose windows end there, and whose impressions are
    presumed negative there, a bit each. of float64 -> stage at which each task's window ends, int64 [tasks]. settling:
    tasks with presumed negatives; at_once: those that have them as soon as a ranking is read.
    """

    def __init__(self, tasks: Sequence[str], config: JoinConfig, presumed: Mapping[str, float]) -> None:
        """presumed: task -> seconds after a ranking at which its impressions are presumed negative. ConfigError."""
        if len(tasks) > MOST_TASKS:
            raise ConfigError(f"learning.join: {len(tasks)} tasks; at most {MOST_TASKS} can be joined")
        self._tasks = tuple(tasks)
        self.windows = np.array([_window(config, task) for task in tasks])
        self.presumed = np.array([_presumed(presumed, t, w) for t, w in zip(tasks, self.windows, strict=True)])
        later = self.presumed > 0
        self.ends = np.unique(np.append(self.windows, self.presumed[later]))
        self.longest = float(self.ends[-1])
        self.of = np.searchsorted(self.ends, self.windows)
        self.closing, self.presuming = (np.zeros(len(self.ends), np.int32) for _ in range(2))
        bits = np.left_shift(1, np.arange(len(tasks)), dtype=np.int32)
        np.bitwise_or.at(self.closing, self.of, bits)
        np.bitwise_or.at(self.presuming, np.searchsorted(self.ends, self.presumed[later]), bits[later])
        self.settling = np.bitwise_or.reduce(bits[~np.isnan(self.presumed)], initial=np.int32(0))
        self.at_once = np.bitwise_or.reduce(bits[self.presumed == 0], initial=np.int32(0))

    def state(self) -> dict[str, np.ndarray]:
        return {
            "tasks": fingerprints(self._tasks),
            "windows": self.windows.copy(),
            "presumed": self.presumed.copy(),
        }

    def check(self, state: Mapping[str, np.ndarray]) -> None:
        """CheckpointError where the state is of other tasks, windows or feedback."""
        same = np.array_equal(state["tasks"], fingerprints(self._tasks))
        if not same or not np.array_equal(state["windows"], self.windows):
            raise CheckpointError(
                "the join's state is of other tasks or windows than learning.join.window_seconds says; "
                "put the old ones back, or start without the checkpoint"
            )
        presumed = state.get("presumed", np.full(len(self._tasks), np.nan))
        if not np.array_equal(presumed, self.presumed, equal_nan=True):
            raise CheckpointError(
                "in the join's state impressions are presumed negative at other times than learning.join.feedback "
                "says; put the old ones back, or start without the checkpoint"
            )


def _window(config: JoinConfig, task: str) -> float:
    windows = config.window_seconds
    seconds = windows.get(task) if isinstance(windows, dict) else windows
    if seconds is None or not 0 <= seconds < np.inf:
        raise ConfigError(f"learning.join.window_seconds: task '{task}' needs a number of seconds, got {seconds}")
    return float(seconds)


def _presumed(presumed: Mapping[str, float], task: str, window: float) -> float:
    """Seconds; nan where a task waits for its window's end."""
    after = presumed.get(task)
    if after is not None and not 0 <= after < window:
        raise ConfigError(
            f"learning.join.feedback: task '{task}' presumes negatives after {after:g} seconds, which is not within "
            f"its window of {window:g}"
        )
    return float("nan") if after is None else float(after)
