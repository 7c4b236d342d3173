"""Scorer `inproc`: inference in this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from engine.bundle import Bundle
from engine.catalogue import ArrowCatalogue
from engine.components import Catalogue, PluginOptions, Scorer, ScoreRequest, Scores
from engine.data.encoder import FeatureEncoder
from engine.errors import BundleError, DeltaGap, PlexrankError
from engine.hookspecs import hookimpl
from engine.inference.runtime import Runtime
from engine.inference.signature import Signature
from engine.item_side import ItemSide
from engine.memory import keep_freed_memory
from engine.model import RankingModel
from engine.plugins import installed
from engine.streaming.deltas.apply import Chain, Step, check_fit, with_dense, with_own_dense, write_rows
from engine.streaming.deltas.delta import Delta
from engine.streaming.deltas.encoder_delta import apart
from engine.streaming.learning.recalibration import apart as without_calibration
from engine.training.calibration import Calibration


@dataclass(frozen=True)
class _Loaded:
    """What scores: replaced as one, never changed but for rows of tables and items, so that no request is disturbed.

    calibration: task -> the bundle's, or a delta's. catalogue: the bundle's, or one that has `grown` from it.
    version: that of the chain, made once.
    """

    bundle: Bundle
    model: RankingModel
    calibration: Mapping[str, Calibration]
    catalogue: ArrowCatalogue
    items: ItemSide | None
    chain: Chain
    version: str
    probe: ScoreRequest
    grown: bool = False

    @property
    def encoder(self) -> FeatureEncoder:
        return self.bundle.encoder

    def logits(self, request: ScoreRequest) -> dict[str, torch.Tensor]:
        quick = self.items.logits(request) if self.items is not None else None
        return self.all_of_it(request) if quick is None else quick

    def all_of_it(self, request: ScoreRequest) -> dict[str, torch.Tensor]:
        """From raw values to logits, whatever the request holds."""
        with torch.inference_mode():
            batch = self.bundle.encoder.encode_request(request, self.catalogue)
            logits: dict[str, torch.Tensor] = self.model(batch)
            return logits

    def scores(self, request: ScoreRequest) -> Scores:
        tasks = {task: self.calibration[task].apply(logits.numpy()) for task, logits in self.logits(request).items()}
        return Scores(tasks, self.bundle.name, self.version)

    def check(self) -> None:
        """Scores the probe; PlexrankError where a score is missing or not finite."""
        scores = self.scores(self.probe)
        for task, values in scores.tasks.items():
            if values.shape != (len(self.probe.items),) or not np.isfinite(values).all():
                raise PlexrankError(f"task {task}: not one finite score an item")


class InprocScorer(Scorer):
    """Scores in this process with weights that are mapped from the bundle's files: no server beside it.

    A new bundle is opened, checked and warmed aside; then one pointer is set. No request waits for a load. A delta's
    rows are written into the tables in place (the bundle's files stay as they are), its dense part into a second model
    that takes the first's place together with the version.
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
        self._runtime = Runtime(self._now)
        self._changing = threading.Lock()  # one writer at a time; readers take no lock
        if self.options.keep_memory:
            keep_freed_memory()
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)

    @property
    def version(self) -> str:
        """Of what scores now: the bundle's, or the newest delta's behind it."""
        return self._now().version

    # ---------------------------------------------------------------------------------------------- requests
    def score(self, request: ScoreRequest) -> Scores:
        """Calibrated probabilities; an empty request gives empty scores."""
        return self._now().scores(request)

    @property
    def signature(self) -> Signature:
        """Of the bundle that scores."""
        return self._runtime.signature

    def infer(self, tensors: Mapping[str, np.ndarray], deadline: float | None = None) -> dict[str, np.ndarray]:
        """As `score`, for a request that comes as tensors."""
        return self._runtime.infer(tensors)

    def explain(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """Weights of the interest model: sequence feature -> float32 [N, H]; nothing without an interest model."""
        loaded = self._now()
        with torch.inference_mode():
            batch = loaded.bundle.encoder.encode_request(request, loaded.catalogue)
            weights = loaded.model.explain(batch)
        n = len(request.items)
        return {name: jagged.values().reshape(n, -1).numpy() for name, jagged in weights.items()}

    def health(self) -> None:
        """Scores the probe; raises if it fails or a score is not finite."""
        self._now().check()

    # ----------------------------------------------------------------------------------------------- changes
    def load(self, bundle: Path) -> None:
        """Reads every file for its checksum, maps the weights, scores once, then swaps. Deltas begin anew."""
        with self._changing:
            opened = Bundle.open(bundle)
            opened.check_parts()
            before = self._loaded
            if before is not None and before.grown and before.bundle.version == opened.version:
                self._loaded = self._made(opened, before.catalogue, grown=True)
            else:
                self._loaded = self._made(opened, opened.catalogue)

    def apply(self, delta: Delta) -> None:
        """Rows in place, in chunks; a dense part is settled and tried aside, then swapped together with the calibration
        and the version.

        The first delta of a newer chain over the same bundle begins from the bundle's own weights, read again.
        """
        delta, _ = apart(delta)
        with self._changing:
            loaded = self._now()
            step = loaded.chain.step(delta)
            if step is Step.KNOWN:
                return
            delta, newer = without_calibration(delta, loaded.bundle.schema.tasks)
            check_fit(loaded.model, delta)
            if step is Step.ANEW:
                loaded = self._begun_anew(loaded, delta)
            model, items, calibration = loaded.model, loaded.items, {**loaded.calibration, **newer}
            if delta.dense:
                model = with_dense(model, delta.dense)
                items = None if items is None else items.with_model(model)
            if delta.dense or newer:
                tried = replace(loaded, model=model, calibration=calibration, items=items)
                _try(tried, f"delta {delta.version}")
            write_rows(model, delta.tables)
            items = items.renewed(delta.tables) if items is not None and delta.tables else items
            chain = loaded.chain.after(delta)
            self._loaded = replace(
                loaded, model=model, calibration=calibration, items=items, chain=chain, version=chain.version
            )

    def items_changed(self, version: str, catalogue: Catalogue, rows: np.ndarray | None) -> None:
        """Makes the vectors of new and changed items, then reads the catalogue that holds them."""
        if not isinstance(catalogue, ArrowCatalogue):
            raise TypeError(f"scorer 'inproc' reads an ArrowCatalogue, not {type(catalogue).__name__}")
        with self._changing:
            loaded = self._now()
            if version != loaded.bundle.version:
                return
            if rows is None or not loaded.grown:
                items = self._item_side(loaded.bundle, loaded.model, catalogue)
            else:
                items = None if loaded.items is None else loaded.items.with_items(catalogue, rows)
            self._loaded = replace(loaded, catalogue=catalogue, items=items, grown=True)

    def _begun_anew(self, loaded: _Loaded, delta: Delta) -> _Loaded:
        """The bundle that scores, without the deltas applied to it. DeltaGap where it is no longer in its place."""
        try:
            opened = Bundle.open(loaded.bundle.path)
        except BundleError as error:
            raise DeltaGap(
                f"delta {delta.version} begins a chain anew, and its bundle cannot be read: {error}"
            ) from error
        if opened.version != delta.base:
            raise DeltaGap(f"delta {delta.version}: {opened.path} now holds {opened.version}: load bundle {delta.base}")
        return self._made(opened, loaded.catalogue, grown=loaded.grown)

    def _made(self, bundle: Bundle, catalogue: ArrowCatalogue, *, grown: bool = False) -> _Loaded:
        """Warm; BundleError where it does not score."""
        model = with_own_dense(bundle.model(installed()))
        chain = Chain(bundle.name, bundle.version)
        try:
            model.settle()
            items = self._item_side(bundle, model, catalogue)
        except Exception as error:
            raise BundleError(f"{bundle.path}: the warm-up call failed: {type(error).__name__}: {error}") from error
        calibration = bundle.calibration
        loaded = _Loaded(bundle, model, calibration, catalogue, items, chain, chain.version, self._probe(bundle), grown)
        for _ in range(2):
            _try(loaded, str(bundle.path))
        return loaded

    def _item_side(self, bundle: Bundle, model: RankingModel, catalogue: ArrowCatalogue) -> ItemSide | None:
        return ItemSide.make(model, bundle.encoder, catalogue, self.options.item_vectors_mb << 20)

    def _probe(self, bundle: Bundle) -> ScoreRequest:
        """A request of real items, for warming up and for `health`."""
        known = bundle.catalogue.ids(np.arange(min(self.options.warm_items, len(bundle.catalogue))))
        items = known or ["item"]
        return ScoreRequest(
            user={}, history={bundle.schema.item: items[:50]} if bundle.schema.item else {}, items=items
        )

    def _now(self) -> _Loaded:
        loaded = self._loaded
        if loaded is None:
            raise PlexrankError("no bundle is loaded")
        return loaded


def _try(loaded: _Loaded, what: str) -> None:
    try:
        loaded.check()
    except Exception as error:
        raise BundleError(f"{what}: the warm-up call failed: {type(error).__name__}: {error}") from error


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [InprocScorer]
