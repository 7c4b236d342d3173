"""What a learner gives out: deltas at an interval, bundles now and then, nothing while the guard says no."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.grow import write_grown
from engine.config_learning import PublishConfig
from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta, ItemVectors, TableRows
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.learning.learner_metrics import LearnerMetrics

if TYPE_CHECKING:
    from engine.catalogue import ArrowCatalogue
    from engine.plugins import Plugins
    from engine.streaming.learning.recalibration import Recalibration
    from engine.streaming.learning.retrieval import OnlineRetrieval
    from engine.training.online import OnlineTrainer

log = logging.getLogger("plexrank.learning")

_RETRY_SECONDS = 1.0
"""Between two attempts at what waits in the outbox."""
_GAPPED_SECONDS = 30.0
"""Between two bundles where files are damaged."""


@dataclass
class Learnt:
    """What there is to give out."""

    trainer: OnlineTrainer
    calibration: Recalibration
    retrieval: OnlineRetrieval | None
    catalogue: ArrowCatalogue
    newest: float  # event time of the newest event trained
    positions: Mapping[int, int]


class Chain:
    """The chain of deltas on a bundle: base, epoch, sequence. `publisher` is what sends them.

    A learner that comes back from its checkpoint trains again what came after it, so the first delta that it makes
    then holds every row that changed since the last delta in the checkpoint (`follows`), and is numbered behind all
    that followers may have seen.
    """

    def __init__(
        self, publisher: DeltaPublisher, bundle: Bundle, epoch: int, config: PublishConfig, metrics: LearnerMetrics
    ) -> None:
        self.publisher, self.config, self.metrics = publisher, config, metrics
        self.bundle, self.epoch, self.sequence = bundle, epoch, 0
        self.published = 0
        self._follows: int | None = None
        self._steps: int | None = None  # that are in the bundle, where this learner made it
        now = time.monotonic()
        self._last = self._dense = self._bundled = self._tried = now

    @property
    def base(self) -> str:
        return self.bundle.version

    def begin(self, bundle: Bundle, epoch: int) -> None:
        """A chain on another bundle, from its first delta on."""
        self.bundle, self.epoch, self.sequence, self._follows = bundle, epoch, 0, None
        self._steps = None
        self._bundled = time.monotonic()

    # ------------------------------------------------------------------------------------------------ deltas
    def due(self, touched: int) -> bool:
        since = time.monotonic() - self._last
        return since >= self.config.interval_seconds or touched >= self.config.rows

    def hold(self) -> None:
        """Lets one time pass without a delta."""
        self._last = time.monotonic()

    def publish(self, learnt: Learnt) -> bool:
        """Makes a delta of all that changed and hands it to the publisher -> whether there was anything to say.

        DeltaGap: the chain was left by somebody else (a rollback, a promotion).
        """
        start = time.monotonic()
        dense = start - self._dense >= self.config.dense_seconds
        tables, tensors = learnt.trainer.take_delta(dense=dense)
        if dense:
            tensors = {**tensors, **learnt.calibration.take_delta()}
        vectors: ItemVectors | None = None
        if learnt.retrieval is not None:
            more_tables, more_tensors = learnt.retrieval.take_delta(dense=dense)
            tables, tensors = {**tables, **more_tables}, {**tensors, **more_tensors}
            vectors = learnt.retrieval.take_vectors()
        self._last = start
        if not tables and not tensors and vectors is None:
            self.flush()
            return False
        if dense:
            self._dense = start
        delta = self._delta(tables, tensors, vectors, learnt)
        done = self.publisher.publish(delta)
        self.sequence, self._follows = delta.sequence, None
        self.published += 1
        self.metrics.published.observe(time.monotonic() - start)
        self.metrics.delta_rows.observe(done.rows)
        if not done.waits:
            self.metrics.delta_bytes.observe(done.bytes)
        return True

    def _delta(
        self,
        tables: Mapping[str, TableRows],
        dense: Mapping[str, Tensor],
        vectors: ItemVectors | None,
        learnt: Learnt,
    ) -> Delta:
        return Delta(
            model=self.bundle.name,
            base=self.base,
            epoch=self.epoch,
            sequence=self.sequence + 1,
            created=time.time(),
            newest=learnt.newest,
            tables=tables,
            dense=dense,
            vectors=vectors,
            positions=dict(learnt.positions),
            follows=self._follows,
        )

    def flush(self) -> None:
        """Sends what waits, now and then."""
        now = time.monotonic()
        if self.publisher.waiting and now - self._tried >= _RETRY_SECONDS:
            self._tried = now
            self.publisher.flush()

    # ----------------------------------------------------------------------------------------------- bundles
    @property
    def bundle_due(self) -> bool:
        """At an interval; soon where the files have a gap, as nobody else could close it."""
        since = time.monotonic() - self._bundled
        return since >= self.config.bundle_seconds or (self.publisher.gapped and since >= _GAPPED_SECONDS)

    def publish_bundle(
        self, learnt: Learnt, folder: Path, plugins: Plugins, figures: Mapping[str, Any], reason: str = "learned"
    ) -> bool:
        """Writes a bundle, makes it current and goes on from it; False, and the chain as it was, where that fails, a
        version is pinned, or nothing was learnt since the last one."""
        self._bundled = time.monotonic()
        now = self.publisher.registry.current()
        if learnt.trainer.steps == self._steps or (now is not None and now.pinned):
            return False
        path = folder / f"bundle-{self.bundle.version}-{self.epoch}-{self.sequence}"
        try:
            grown = grow(path, self.bundle, learnt, plugins, figures)
            pointer = self.publisher.publish_bundle(grown.path, self.epoch, reason)
            there = Bundle.open(self.publisher.registry.bundle(pointer.version), verify=False)
        except BundleError as error:
            log.error("no bundle was published: %s", error)
            return False
        finally:
            shutil.rmtree(path, ignore_errors=True)
        learnt.trainer.take_delta()  # the bundle holds it
        learnt.calibration.take_delta()
        if learnt.retrieval is not None:
            learnt.retrieval.take_delta()
        self.begin(there, pointer.epoch)
        self._steps = learnt.trainer.steps
        return True

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        return {"base": self.base, "epoch": self.epoch, "sequence": self.sequence}

    def outbox(self) -> dict[str, np.ndarray]:
        """What the log does not have yet."""
        return {f"{n:06d}": np.frombuffer(part, np.uint8) for n, part in enumerate(self.publisher.pending())}

    def load(self, sequence: int, outbox: Mapping[str, np.ndarray]) -> None:
        """Goes on behind a checkpoint of this chain, which had given out deltas up to `sequence`."""
        self.publisher.restore([outbox[name].tobytes() for name in sorted(outbox)])
        reached = self.publisher.reached(self.base, self.epoch)
        self._follows = sequence if reached > sequence else None
        self.sequence = max(sequence, reached)


def grow(
    path: Path, base: Bundle, learnt: Learnt, plugins: Plugins, figures: Mapping[str, Any], *, replace: bool = False
) -> Bundle:
    """Writes what was learnt as a bundle that grew from `base`."""
    return write_grown(
        path,
        base,
        model=learnt.trainer.frozen(),
        optimizer=learnt.trainer.optimizer_state(),
        calibration=learnt.calibration.now,
        catalogue=learnt.catalogue,
        encoder=None if learnt.retrieval is None else learnt.retrieval.frozen(),
        metrics={"learning": figures},
        plugins=plugins,
        replace=replace,
    )


def or_none(value: float) -> float | None:
    """The number; None, as JSON knows no other way to say it, where it is not finite."""
    return value if math.isfinite(value) else None
