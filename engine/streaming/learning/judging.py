"""Every example is judged before it trains: figures of merit, drift, and whether to publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.batch import Batch
from engine.bundle import Bundle
from engine.config_learning import GuardConfig
from engine.streaming.join.emitted import PRESUMED
from engine.streaming.join.ready import Examples
from engine.streaming.learning.drift import Drift
from engine.streaming.learning.guard import Guard, Verdict
from engine.streaming.learning.progress import FrozenBase, ProgressiveValidation
from engine.streaming.learning.report import write_learning_report
from engine.training.calibration import Calibration

if TYPE_CHECKING:
    from engine.plugins import Plugins
    from engine.training.online import OnlineTrainer

VERDICTS = 1000
"""Changes of the guard's mind that are kept for the report."""


class Judge:
    """Compares the model that learns with the bundle that learning began with, on the same rows."""

    def __init__(
        self, config: GuardConfig, bundle: Bundle, plugins: Plugins, on_stop: Callable[[Verdict, str], None]
    ) -> None:
        self._plugins = plugins
        self.begun_with = bundle.version
        self.validation = ProgressiveValidation(bundle.schema.tasks, config.window)
        self.guard = Guard(config, begun_with=bundle.version, on_stop=on_stop)
        self.verdicts: list[Verdict] = []
        reference = bundle.drift
        self._drift = None if reference is None else Drift(reference, bundle.schema)
        self._base = FrozenBase(bundle, plugins)

    @torch.no_grad()
    def observe(
        self, trainer: OnlineTrainer, calibration: Mapping[str, Calibration], batch: Batch, examples: Examples
    ) -> dict[str, np.ndarray]:
        """Scores a batch as it would be served now -> task -> logits float32 [n]."""
        logits = trainer.score(batch)
        told = np.stack([calibration[t].apply(logits[t]) for t in trainer.tasks], axis=1)
        weight = examples.stands_for
        self.validation.observe(examples.labels, told, self._base(batch), weight, examples.seconds, examples.kind)
        if self._drift is not None:
            self._drift.observe(batch, np.where(examples.kind == PRESUMED, np.float32(0), weight))  # it comes again
        return logits

    def verdict(self) -> Verdict:
        """Whether to publish what was learnt so far."""
        verdict = self.guard.judge(self.validation.figures())
        last = self.verdicts[-1] if self.verdicts else None
        if last is None or (verdict.ok, verdict.reasons) != (last.ok, last.reasons):
            self.verdicts = [*self.verdicts[1 - VERDICTS :], verdict]
        return verdict

    def published(self, version: str) -> None:
        """A bundle, to which one may go back."""
        self.guard.published(version, self.validation.figures()["examples"])

    def report(self, path: Path, counts: Mapping[str, Any], title: str) -> None:
        """`learning.html` and `learning.json`."""
        psi = None if self._drift is None else self._drift.psi()
        write_learning_report(path, self.validation.curve, psi, self.verdicts, counts, title=title)

    # ------------------------------------------------------------------------------------------------- state
    def arrays(self) -> dict[str, np.ndarray]:
        drift = {} if self._drift is None else self._drift.state()
        return {
            **{f"validation/{name}": value for name, value in self.validation.state().items()},
            **{f"drift/{name}": value for name, value in drift.items()},
        }

    def state(self) -> dict[str, Any]:
        return {"begun_with": self.begun_with, "guard": self.guard.state()}

    def load(
        self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray], find: Callable[[str], Bundle | None]
    ) -> None:
        """find: version -> its bundle, where it is still there; else the one that is current is compared with."""
        parts = {p: {n.removeprefix(p): v for n, v in arrays.items() if n.startswith(p)} for p in _PARTS}
        self.validation.load(parts["validation/"])
        if self._drift is not None and parts["drift/"]:
            self._drift.load(parts["drift/"])
        self.guard.load(state["guard"])
        if state["begun_with"] != self.begun_with:
            begun = find(state["begun_with"])
            if begun is not None:
                self._base, self.begun_with = FrozenBase(begun, self._plugins), begun.version


_PARTS = ("validation/", "drift/")
