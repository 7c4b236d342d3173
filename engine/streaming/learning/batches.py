"""What is done with a batch of joined examples: judged, what is due given out, trained, counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from engine.batch import Batch
from engine.streaming.join.emitted import KINDS, SETTLED
from engine.streaming.join.ready import Examples
from engine.streaming.learning.audit import Audit
from engine.streaming.learning.digest import ExamplesDigest
from engine.streaming.learning.judging import Judge
from engine.streaming.learning.learner_metrics import LearnerMetrics, Stages

if TYPE_CHECKING:
    from engine.streaming.learning.examples_read import ExamplesRead
    from engine.streaming.learning.joining import EventsJoined
    from engine.streaming.learning.parted import PartedStream
    from engine.streaming.learning.trained_model import TrainedModel


class Batches:
    """Takes batches one by one. model: what is trained; the learner puts another in its place when it begins anew.

    newest: event time of the newest example that was trained; nan before there was one. counts: examples by kind, and
    `trained`, are added to it.
    """

    def __init__(
        self,
        stream: EventsJoined | ExamplesRead | PartedStream,
        model: TrainedModel,
        judge: Judge,
        *,
        write: Callable[[Batch, Examples], None] | None,
        give_due: Callable[[], None],
        digest: ExamplesDigest | None,
        counts: Counter[str],
        metrics: LearnerMetrics,
        spent: Stages,
    ) -> None:
        """write: joined examples for other learners. give_due: publishes what is due. digest: of all that was taken."""
        self.model, self.digest = model, digest
        self.audit: Audit | None = None
        self.newest = float("nan")
        self._stream, self._judge, self._write, self._give_due = stream, judge, write, give_due
        self._counts, self._metrics, self._spent = counts, metrics, spent

    def take(self, examples: Examples) -> None:
        """Judges, gives out what is due, then trains. No checkpoint in between: the batch would be in none."""
        if not len(examples):
            return
        start, spent, model = time.monotonic(), self._spent, self.model
        with spent("features"):
            batch = self._stream.pending.take(examples.slot)
        if self.digest is not None:
            with spent("digest"):
                self.digest.add(batch, examples)
        if self._write is not None:
            with spent("writing"):
                self._write(batch, examples)
        with spent("judging"):
            logits = self._judge.observe(model.trainer, model.calibration.now, batch, examples)
        self._give_due()
        with spent("calibration"):
            model.calibration.observe(logits, examples)
        newest = float(examples.seconds.max())
        self.newest = float(np.fmax(self.newest, newest))
        self._train(batch, examples)
        self._stream.pending.release(self._stream.ready.free())
        kinds = dict(zip(KINDS, np.bincount(examples.kind, minlength=len(KINDS)).tolist(), strict=True))
        self._counts.update(kinds)
        self._counts["trained"] += len(examples) - kinds[KINDS[SETTLED]]
        self._metrics.trained(kinds, newest, time.monotonic() - start)

    def _train(self, batch: Batch, examples: Examples) -> None:
        """Without the settled ones, which were trained when they were presumed."""
        rest = examples.to_train
        if not len(rest):
            return
        if len(rest) < len(examples):
            with self._spent("features"):
                batch = self._stream.pending.take(rest.slot)
        with self._spent("training"):
            if self.audit is not None:
                self.audit.write(self.model.trainer.steps, rest)
            self.model.train(batch, rest, self.newest)
        with self._spent("retrieval"):
            self.model.train_retrieval(rest, self._stream.pending.take, self._stream.catalogue)
