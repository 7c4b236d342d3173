"""Gives out what is learnt, as far as the guard allows it, and says when to begin anew from another bundle."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.bundle import Bundle
from engine.config_learning import PublishConfig
from engine.errors import BundleError, DeltaGap
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.learning.chain import Chain, Learnt
from engine.streaming.learning.guard import Verdict
from engine.streaming.learning.judging import Judge
from engine.streaming.learning.learner_metrics import LearnerMetrics, Stages

if TYPE_CHECKING:
    from engine.plugins import Plugins

log = logging.getLogger("plexrank.learning")

_LAST_SECONDS = 5.0


class Giving:
    """Of one learner. counts: bundles, held, rollbacks are added to it."""

    def __init__(
        self,
        publisher: DeltaPublisher,
        bundle: Bundle,
        epoch: int,
        config: PublishConfig,
        plugins: Plugins,
        folder: Path,
        *,
        counts: Counter[str],
        metrics: LearnerMetrics,
        spent: Stages,
    ) -> None:
        """folder: where bundles are written before they are published."""
        self.chain = Chain(publisher, bundle, epoch, config, metrics)
        self.counts = counts
        self.held = False
        self._publisher, self._plugins, self._folder, self._keep = publisher, plugins, folder, config.keep
        self._metrics, self._spent = metrics, spent
        self._roll_back_to: tuple[Verdict, str] | None = None
        self._left = False

    def on_stop(self, verdict: Verdict, good: str) -> None:
        """The guard stopped publishing."""
        self._roll_back_to = (verdict, good)

    def due(self, touched: int) -> bool:
        """While it is held back, rows that wait are no reason to judge more often: that takes longer than a step."""
        return self.chain.due(0 if self.held else touched)

    def delta(self, learnt: Learnt, judge: Judge) -> None:
        """A delta, where the guard allows it and the chain was not left."""
        verdict = judge.verdict()
        if self._left:
            return
        if not verdict.ok:
            if not self.held:
                log.warning("publishing stops: %s", "; ".join(verdict.reasons))
            self.held = True
            self.counts["held"] += 1
            self._metrics.held.inc()
            self.chain.hold()
            self._left = self._is_left()
            return
        self.held = False
        try:
            with self._spent("publishing"):
                self.chain.publish(learnt)
        except DeltaGap as error:
            log.warning("%s", error)
            self._left = True

    def bundle(self, learnt: Learnt, judge: Judge, figures: Mapping[str, Any], *, due: bool = False) -> bool:
        """Publishes a bundle, from which the chain goes on, where the guard allows it -> whether it did.

        due: only where it is time for one.
        """
        if judge.guard.stopped or self._left or (due and not self.chain.bundle_due):
            return False
        with self._spent("bundles"):
            published = self.chain.publish_bundle(learnt, self._folder, self._plugins, figures)
        if published:
            judge.published(self.chain.base)
            self._prune(judge)
            self.counts["bundles"] += 1
            there = self.chain.bundle
            self._plugins.notify("on_publish", bundle=there.path, manifest=there.manifest.as_json())
        return published

    def _is_left(self) -> bool:
        """Whether somebody made another bundle current; who publishes is told so by the publisher."""
        pointer = self._publisher.registry.current()
        return pointer is not None and (pointer.version != self.chain.base or pointer.epoch > self.chain.epoch)

    def _prune(self, judge: Judge) -> None:
        """Old versions go, but for those that the guard may go back to."""
        try:
            judge.guard.removed(self._publisher.registry.prune(self._keep, judge.guard.needed))
        except (OSError, BundleError) as error:
            log.warning("old versions stay: %s", error)

    def anew(self) -> Bundle | None:
        """The bundle to begin anew from: the guard's last good one, or what somebody else made current."""
        registry = self._publisher.registry
        if self._roll_back_to is not None:
            (verdict, good), self._roll_back_to = self._roll_back_to, None
            reason = f"guard: {verdict.reasons[0]}"
            try:
                version = registry.rollback(good, reason=reason, keep_pinned=True).version
                log.warning("rolled back to %s: %s", version, reason)
                self.counts["rollbacks"] += 1
                self._left = True
            except BundleError as error:
                log.error("cannot roll back to %s: %s", good, error)
        if not self._left:
            return None
        pointer = registry.current()
        if pointer is None:
            return None
        self._left = False
        bundle = Bundle.open(registry.bundle(pointer.version))
        self.chain.begin(bundle, pointer.epoch)
        return bundle

    def end(self) -> None:
        """Nothing more is learnt: what the log did not take has a moment left, then it waits in the checkpoint."""
        if not self._publisher.drain(_LAST_SECONDS):
            log.warning("deltas wait in the checkpoint: %s", self._publisher.trouble or "the version is pinned")

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        return self.chain.state()

    def outbox(self) -> dict[str, np.ndarray]:
        return self.chain.outbox()

    def load(self, state: Mapping[str, Any], outbox: Mapping[str, np.ndarray]) -> None:
        """Of a checkpoint: of the chain that goes on, or of the one before it, whose end is a bundle now."""
        self.chain.load(int(state["sequence"]) if state["base"] == self.chain.base else 0, outbox)
