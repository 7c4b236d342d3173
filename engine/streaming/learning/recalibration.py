"""The calibration follows the weights: it is fitted anew on the newest examples, each scored before it was trained.

A bundle's calibration fits the logits of the weights that it was made with, not of those that learned on. So every
task's is replaced by Platt's map (two numbers) of the newest `window` examples as soon as these hold `LEAST` of each
class, and again after each `EVERY`. Where one class is rarer than that, up to `LONGER` windows are looked at. Thinned
negatives stand for as many as they are of; corrections and presumed negatives are left out.

A positive is known at once, a negative only when its window has passed: what comes together are positives of now and
negatives of some time ago, of which there may have been more or fewer. So a positive waits until a negative came that
was shown no earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.errors import BundleError, CheckpointError
from engine.streaming.deltas.delta import Delta
from engine.streaming.join.emitted import judged
from engine.streaming.join.ready import Examples
from engine.training.calibration import Calibration

EVERY = 1000
"""Examples between two fits."""
LEAST = 500
"""Examples of each class that a fit needs."""
LONGER = 5
"""Windows that are kept."""
MOST_WAITING = 4
"""Windows of positives that wait for negatives of their time; beyond, half of them stand for all."""
PREFIX = "calibration."
"""Before `<task>.<tensor>` in a delta's dense part."""


class Recalibration:
    """now: task -> the calibration to serve with; `begun`'s until there are enough examples.

    follow: False leaves it as it was. What `now` is depends on the examples alone, in their order.
    """

    def __init__(self, tasks: Sequence[str], begun: Mapping[str, Calibration], window: int, *, follow: bool) -> None:
        self.tasks = tuple(tasks)
        self.now = {task: begun[task] for task in tasks}
        self._sent: Mapping[str, Calibration] = dict(self.now)
        self._newest = [_Newest(window) for _ in self.tasks] if follow else []

    def observe(self, logits: Mapping[str, np.ndarray], examples: Examples) -> None:
        """Takes examples with their logits, task -> float32 [n], of before they were trained; fits what is due."""
        told = judged(examples.kind)
        weight, seconds, labels = examples.stands_for[told], examples.seconds[told], examples.labels[told]
        for j, newest in enumerate(self._newest):
            newest.add(logits[self.tasks[j]][told], labels[:, j], weight, seconds)
            fitted = newest.fit_if_due()
            if fitted is not None:
                self.now[self.tasks[j]] = fitted

    def take_delta(self) -> dict[str, Tensor]:
        """The tensors of each task's calibration that changed since they were last taken, by their names in a delta."""
        changed = {task: its for task, its in self.now.items() if self._sent.get(task) is not its}
        self._sent = dict(self.now)
        return {n: t for task, its in changed.items() for n, t in its.to_tensors(f"{PREFIX}{task}.").items()}

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        """All of it, for a checkpoint."""
        found: dict[str, np.ndarray] = {}
        for j, newest in enumerate(self._newest):
            tensors = self.now[self.tasks[j]].to_tensors(f"{j}/now/")
            found |= {name: value.numpy() for name, value in tensors.items()}
            found |= {f"{j}/{name}": value for name, value in newest.state().items()}
        return found

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from there exactly, and gives all of it out once more: followers may have what came after it.

        CheckpointError where the state is of another window.
        """
        self._sent = {}
        if not state:
            return  # it did not follow then
        for j, newest in enumerate(self._newest):
            newest.load({n.removeprefix(f"{j}/"): v for n, v in state.items() if n.startswith(f"{j}/")})
            tensors = {n: torch.from_numpy(np.array(v)) for n, v in state.items() if n.startswith(f"{j}/now/")}
            self.now[self.tasks[j]] = Calibration.from_tensors(tensors, f"{j}/now/")


class _Newest:
    """The newest examples of one task, scored before they were trained: a ring, and the positives that wait."""

    def __init__(self, window: int) -> None:
        self._window = window
        size = LONGER * window
        self._logits, self._weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self._positive = np.zeros(size, bool)
        self._next, self._held, self._since = 0, 0, 0
        self._clock = -np.inf  # of the newest negative
        self._waiting = np.empty((3, 0), np.float64)  # seconds, logits, weight of positives

    def add(self, logits: np.ndarray, labels: np.ndarray, weight: np.ndarray, seconds: np.ndarray) -> None:
        """Rows of which the task says nothing, and scores that are no numbers, are left out."""
        told = np.isfinite(labels) & np.isfinite(logits)
        positive, negative = told & (labels > 0.5), told & (labels <= 0.5)
        self._clock = max(self._clock, float(seconds[negative].max(initial=-np.inf)))
        came = np.stack([seconds[positive], logits[positive], weight[positive]]).astype(np.float64)
        waiting = np.concatenate([self._waiting, came], axis=1)
        ripe = waiting[0] <= self._clock
        self._enter(logits[negative], weight[negative], positive=False)
        self._enter(waiting[1, ripe], waiting[2, ripe], positive=True)
        self._waiting = waiting[:, ~ripe]
        if self._waiting.shape[1] > MOST_WAITING * self._window:
            self._waiting = _sampled(self._waiting, MOST_WAITING * self._window // 2)

    def _enter(self, logits: np.ndarray, weight: np.ndarray, *, positive: bool) -> None:
        size = len(self._logits)
        places = (self._next + np.arange(len(logits))) % size
        self._logits[places], self._weight[places], self._positive[places] = logits, weight, positive
        self._next = (self._next + len(logits)) % size
        self._held = min(size, self._held + len(logits))
        self._since += len(logits)

    def fit_if_due(self) -> Calibration | None:
        """A calibration, where one is due and there is enough to fit it on."""
        if self._since < EVERY:
            return None
        self._since = 0
        for count in (min(self._held, self._window), self._held):
            rows = np.sort((self._next - 1 - np.arange(count)) % len(self._logits))
            positive = self._positive[rows]
            if min(int(positive.sum()), int((~positive).sum())) >= LEAST:
                fitted = Calibration.fit(self._logits[rows], positive, "platt", self._weight[rows])
                return fitted if fitted.increasing else None
        return None

    def state(self) -> dict[str, np.ndarray]:
        return {
            "numbers": np.array([self._next, self._held, self._since], np.int64),
            "clock": np.array([self._clock]),
            "logits": self._logits.copy(),
            "weight": self._weight.copy(),
            "positive": self._positive.astype(np.uint8),
            "waiting": self._waiting.copy(),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        if state["logits"].shape != self._logits.shape:
            raise CheckpointError(
                f"calibration: {len(state['logits']):,} examples are in the checkpoint, {len(self._logits):,} are "
                "wanted: learning.guard.window was changed; begin anew, or change it back"
            )
        self._next, self._held, self._since = state["numbers"].tolist()
        self._clock = float(state["clock"][0])
        self._logits, self._weight = state["logits"].copy(), state["weight"].copy()
        self._positive, self._waiting = state["positive"] != 0, state["waiting"].copy()


def _sampled(waiting: np.ndarray, count: int) -> np.ndarray:
    """`count` columns of equal weight for all of them: systematic sampling in proportion to weight."""
    reach = np.cumsum(waiting[2])
    each = reach[-1] / count
    chosen = waiting[:, np.searchsorted(reach, each * (np.arange(count) + 0.5))]
    chosen[2] = each
    return chosen


def apart(delta: Delta, tasks: Sequence[str]) -> tuple[Delta, dict[str, Calibration]]:
    """The delta without its calibrations, and those: task -> its new one. BundleError for what is none of a task."""
    given = {name: tensor for name, tensor in delta.dense.items() if name.startswith(PREFIX)}
    if not given:
        return delta, {}
    named = {f"{PREFIX}{task}.": task for task in tasks}
    found = {task: prefix for prefix, task in named.items() if any(name.startswith(prefix) for name in given)}
    strange = [name for name in given if f"{name.rpartition('.')[0]}." not in named]
    if strange:
        raise BundleError(f"delta {delta.version}: tensor '{strange[0][:100]}' is of no task of this model")
    dense = {name: tensor for name, tensor in delta.dense.items() if name not in given}
    return replace(delta, dense=dense), {t: Calibration.from_tensors(given, prefix) for t, prefix in found.items()}
