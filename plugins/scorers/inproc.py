"""Scorer `inproc`: inference in this process."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from engine.bundle import Bundle
from engine.components import PluginOptions, Scorer, ScoreRequest, Scores
from engine.errors import BundleError, PlexrankError
from engine.hookspecs import hookimpl
from engine.item_side import ItemSide
from engine.memory import keep_freed_memory
from engine.model import RankingModel
from engine.plugins import installed


@dataclass(frozen=True)
class _Loaded:
    """One bundle, ready; never changed, so that a request that holds it is not disturbed by a swap."""

    bundle: Bundle
    model: RankingModel
    items: ItemSide | None
    probe: ScoreRequest

    def logits(self, request: ScoreRequest) -> dict[str, torch.Tensor]:
        quick = self.items.logits(request) if self.items is not None else None
        return self.all_of_it(request) if quick is None else quick

    def all_of_it(self, request: ScoreRequest) -> dict[str, torch.Tensor]:
        """From raw values to logits, whatever the request holds."""
        with torch.inference_mode():
            batch = self.bundle.encoder.encode_request(request, self.bundle.catalogue)
            logits: dict[str, torch.Tensor] = self.model(batch)
            return logits

    def scores(self, request: ScoreRequest) -> Scores:
        calibration = self.bundle.calibration
        tasks = {task: calibration[task].apply(logits.numpy()) for task, logits in self.logits(request).items()}
        return Scores(tasks, self.bundle.name, self.bundle.version)


class InprocScorer(Scorer):
    """Scores in this process with weights that are mapped from the bundle's files: no server beside it.

    A new bundle is opened, checked and warmed aside; then one pointer is set. No request waits for a load.
    """

    name = "inproc"

    class Options(PluginOptions):
        threads: int | None = Field(
            None, ge=1, description="torch threads an inference, of the whole process; default: as torch decides"
        )
        keep_memory: bool = Field(True, description="keep freed memory in the process: quicker; it stays at its peak")
        item_vectors_mb: int = Field(
            256,
            ge=0,
            description="most memory for items' vectors made at the start, MiB; beyond it each request makes its",
        )
        warm_items: int = Field(200, ge=1, le=2000, description="candidates of the warm-up call")

    options: Options

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._loaded: _Loaded | None = None
        self._loading = threading.Lock()
        if self.options.keep_memory:
            keep_freed_memory()
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)

    @property
    def version(self) -> str:
        """Of the bundle that scores now."""
        return self._now().bundle.version

    def load(self, bundle: Path) -> None:
        """Reads every file for its checksum, maps the weights, scores once, then swaps."""
        with self._loading:
            opened = Bundle.open(bundle)
            opened.check_parts()
            model = opened.model(installed()).eval()
            try:
                model.settle()
                items = ItemSide.make(model, opened.encoder, opened.catalogue, self.options.item_vectors_mb << 20)
                loaded = _Loaded(opened, model, items, self._probe(opened))
                for _ in range(2):
                    _check(loaded.scores(loaded.probe), loaded.probe)
            except Exception as error:
                raise BundleError(f"{bundle}: the warm-up call failed: {type(error).__name__}: {error}") from error
            self._loaded = loaded

    def _probe(self, bundle: Bundle) -> ScoreRequest:
        """A request of real items, for warming up and for `health`."""
        known = bundle.catalogue.ids(np.arange(min(self.options.warm_items, len(bundle.catalogue))))
        items = known or ["item"]
        return ScoreRequest(
            user={}, history={bundle.schema.item: items[:50]} if bundle.schema.item else {}, items=items
        )

    def score(self, request: ScoreRequest) -> Scores:
        """Calibrated probabilities; an empty request gives empty scores."""
        return self._now().scores(request)

    def explain(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """Weights of the interest model: sequence feature -> float32 [N, H]; nothing without an interest model."""
        loaded = self._now()
        with torch.inference_mode():
            batch = loaded.bundle.encoder.encode_request(request, loaded.bundle.catalogue)
            weights = loaded.model.explain(batch)
        n = len(request.items)
        return {name: jagged.values().reshape(n, -1).numpy() for name, jagged in weights.items()}

    def apply(self, delta: Any) -> None:
        """Row deltas belong to learners; the bundle in this process is read-only."""
        raise BundleError("scorer 'inproc' takes whole bundles, not row deltas: publish a bundle and load it")

    def health(self) -> None:
        """Scores the probe; raises if it fails or a score is not finite."""
        loaded = self._now()
        _check(loaded.scores(loaded.probe), loaded.probe)

    def _now(self) -> _Loaded:
        loaded = self._loaded
        if loaded is None:
            raise PlexrankError("no bundle is loaded")
        return loaded


def _check(scores: Scores, request: ScoreRequest) -> None:
    for task, values in scores.tasks.items():
        if values.shape != (len(request.items),) or not np.isfinite(values).all():
            raise PlexrankError(f"task {task}: not one finite score an item")


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [InprocScorer]
