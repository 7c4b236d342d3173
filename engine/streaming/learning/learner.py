"""The learner: events in, a model that follows them out; after a crash it goes on as if there had been none.

A turn takes a chunk of one partition, joins it, and trains every whole batch that is ready. Each batch is judged before
it trains; what is due is published between the two, so that what goes out was judged. Everything that the next turn
depends on is in one checkpoint: weights, optimizers' state, join, examples that wait, positions.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.bundle import Bundle
from engine.components import EventLog
from engine.config import Config
from engine.errors import BundleError, ConfigError, LogGap
from engine.plugins import Plugins
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.dead import DeadLetters
from engine.streaming.join.example_schema import schema_id
from engine.streaming.join.ready import Examples
from engine.streaming.learning.audit import Audit
from engine.streaming.learning.batches import Batches
from engine.streaming.learning.beginning import CHOICES, begin
from engine.streaming.learning.chain import Learnt, grow
from engine.streaming.learning.checkpointing import LearnerCheckpoints, Saved
from engine.streaming.learning.digest import ExamplesDigest
from engine.streaming.learning.examples_read import ExamplesRead
from engine.streaming.learning.examples_written import ExamplesWritten
from engine.streaming.learning.fetch import Chunk, Fetched, Fetcher
from engine.streaming.learning.giving import Giving
from engine.streaming.learning.guard import Verdict
from engine.streaming.learning.joining import EventsJoined
from engine.streaming.learning.judging import Judge
from engine.streaming.learning.learner_metrics import LearnerMetrics, Stages
from engine.streaming.learning.locks import FolderLock, PartitionLocks
from engine.streaming.learning.monitoring import PositionsCopy
from engine.streaming.learning.parted import PartedStream
from engine.streaming.learning.saving import Saves
from engine.streaming.learning.source import joined
from engine.streaming.learning.span import Start, Until, ends_of
from engine.streaming.learning.summary import figures_of, state_of, summary_of
from engine.streaming.learning.trained_model import TrainedModel
from engine.training.online import OnlineTrainer

log = logging.getLogger("plexrank.learning")

Progress = Callable[[str, float], None]
Stream = EventsJoined | ExamplesRead | PartedStream

_TICK = 0.05


class Learner:
    """One model, one set of partitions, one thread that learns; `stop` may be called from any other."""

    choices = CHOICES
    """What to do where the log was cut before the positions."""

    def __init__(
        self,
        config: Config,
        events: EventLog,
        out: Path,
        *,
        plugins: Plugins,
        bundle: Path | None = None,
        registry: ModelRegistry | None = None,
        partitions: Sequence[int] | None = None,
        start: Start | None = None,
        audit: Path | None = None,
        locks: Path | None = None,
        metrics: LearnerMetrics | None = None,
        progress: Progress | None = None,
    ) -> None:
        """config: how to join and learn; the model is the bundle's. events: the log of raw events; what is read is it,
        or its sibling `examples`. out: checkpoints, report and, without a registry, the bundle at the end. registry:
        where deltas and bundles are published, and the model comes from; `bundle` begins it where it is empty.
        partitions: all where None. start: where to begin (`beginning.begin`). locks: folder that learners of this log
        share. Errors: BundleError, CheckpointError, LogGap, EventError; each says what to do.
        """
        self.config, self.learning, self.events, self.out = config, config.learning, events, Path(out)
        self.plugins, self.registry = plugins, registry
        self.metrics = metrics or LearnerMetrics()
        self.spent = Stages()
        self.counts: Counter[str] = Counter()
        self.learner, self.turn = uuid.uuid4().hex, -1
        self._progress = progress or (lambda stage, share: None)
        self._stopping = threading.Event()
        self.giving: Giving | None = None
        self._closing: list[Callable[[], None]] = []
        self.group = self.learning.group
        self.source = events if self.learning.source == "events" else self._sibling("examples")
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        try:
            self._own(partitions, (locks or self.out / "locks") / self.learning.source)
            self._closing.append(FolderLock(self.out).release)
            self._begin(bundle, start, audit)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------- start
    def _own(self, partitions: Sequence[int] | None, locks: Path) -> None:
        """Takes the partitions for this process."""
        there = self.source.ends()
        self.partitions = sorted(there) if partitions is None else sorted(set(partitions))
        if not self.partitions or not set(self.partitions) <= set(there):
            raise ConfigError(f"--partitions: the log has {', '.join(map(str, sorted(there)))}")
        self._closing.append(PartitionLocks(locks, self.partitions).release)

    def _streamed(self, bundle: Bundle, dead: DeadLetters) -> Stream:
        return joined(self.config, bundle, dead, self.plugins, self._stopping.is_set)

    def _begin(self, given: Path | None, start: Start | None, audit: Path | None) -> None:
        self.checkpoints = LearnerCheckpoints(self.out / "checkpoints", self.learning.keep_checkpoints)
        publisher = None if self.registry is None else self._publishing(self.registry)
        found = begin(
            self.config,
            self.source,
            self.partitions,
            self.checkpoints,
            given=given,
            registry=self.registry,
            publisher=publisher,
            start=start,
            group=self.group,
        )
        bundle, self.positions = found.bundle, found.positions
        dead = DeadLetters(self.source)
        self._closing.append(dead.close)
        self.stream: Stream = self._streamed(bundle, dead)
        if publisher is not None:
            self.giving = Giving(
                publisher,
                bundle,
                found.epoch,
                self.learning.publish,
                self.plugins,
                self.out,
                counts=self.counts,
                metrics=self.metrics,
                spent=self.spent,
            )
        self.judge = Judge(self.learning.guard, bundle, self.plugins, self._on_stop)
        self.model = TrainedModel(bundle, self.config, self.plugins, self.stream.catalogue)
        self.digest = ExamplesDigest(bundle.schema) if self.group is None else None
        self.batches = Batches(
            self.stream,
            self.model,
            self.judge,
            write=self._writing(bundle) if self.learning.write_examples else None,
            give_due=self._give_due,
            digest=self.digest,
            counts=self.counts,
            metrics=self.metrics,
            spent=self.spent,
        )
        copy = PositionsCopy(self.source, bundle.name)
        self._closing.append(copy.close)
        if found.saved is not None:
            self._restore(found.saved)
        if audit is not None:
            self.batches.audit = Audit(audit, self.counts["audited"])
            self._closing.append(self.batches.audit.close)
        self.stream.assign(self.partitions, 0.0)
        events = self.stream.counts["events"]
        self.saves = Saves(self.checkpoints, self.learning, copy, self.plugins, self.metrics, events)

    def _sibling(self, name: str, **how: Any) -> EventLog:
        beside = self.events.sibling(name, **how)
        self._closing.append(beside.close)
        return beside

    def _publishing(self, registry: ModelRegistry) -> DeltaPublisher:
        deltas, models = self._sibling("deltas", partitions=1), self._sibling("models", partitions=1, compact=True)
        publisher = DeltaPublisher(deltas, models, registry, dtype=self.learning.publish.dtype)
        self._closing.append(publisher.close)
        return publisher

    def _on_stop(self, verdict: Verdict, good: str) -> None:
        if self.giving is not None:
            self.giving.on_stop(verdict, good)

    def _restore(self, saved: Saved) -> None:
        state = saved.state
        self.stream.load(saved.arrays("stream"))
        self.model.load(saved, self.stream.catalogue)
        self.judge.load(state["judge"], saved.arrays("judge"), self._find)
        if not (digest := saved.arrays("digest")):
            self.digest = self.batches.digest = None
        elif self.digest is not None:
            self.digest.load(digest)
        if self.giving is not None:
            self.giving.load(state, saved.arrays("outbox"))
        self.turn, self.learner = int(state["turn"]), str(state["learner"])
        self.counts.update(state["counts"])
        self.batches.newest = math.nan if state["newest"] is None else float(state["newest"])
        log.info("goes on at step %d from %s", self.trainer.steps, saved.path)
        self._progress(f"goes on after {self.trainer.steps} steps", 1.0)

    def _find(self, version: str) -> Bundle | None:
        try:
            return None if self.registry is None else Bundle.open(self.registry.bundle(version), verify=False)
        except BundleError:
            return None

    @property
    def trainer(self) -> OnlineTrainer:
        return self.model.trainer

    @property
    def newest(self) -> float:
        """Event time of the newest example that was trained; nan: none was."""
        return self.batches.newest

    @property
    def bundle(self) -> Bundle:
        """The one that the weights began from, or grew into."""
        return self.model.bundle if self.giving is None else self.giving.chain.bundle

    # ------------------------------------------------------------------------------------------------ running
    def run(self, until: Until = "live") -> dict[str, Any]:
        """Learns until `stop`, or where `until` says -> `summary`. What was learnt is in a checkpoint on return."""
        ends = ends_of(self.source, until, self.positions)
        live = ends is None
        whole = sum(max(0, ends[p] - self.positions[p]) for p in self.partitions) if ends is not None else 0
        begun = sum(self.positions.values())
        fetcher = self._fetcher(ends)
        since = time.monotonic()  # when the oldest example that waits began to
        try:
            self._train_whole()
            while not self._stopping.is_set():
                with self.spent("waiting"):
                    chunk = fetcher.get(self._patience(live, since))
                if chunk is not None:
                    self._take(chunk, live)
                elif fetcher.done:
                    break
                elif live and fetcher.trouble is None:  # a log that does not answer is not silent
                    self.stream.advance(time.monotonic())
                if self._train_whole() or not len(self.stream.ready):
                    since = time.monotonic()
                if live and time.monotonic() - since >= self.learning.max_delay_seconds:
                    while len(self.stream.ready):
                        self.batches.take(self.stream.ready.pop(self.learning.batch_size))
                    since = time.monotonic()
                self._between(fetcher)
                if whole:
                    done = sum(self.positions.values()) - begun
                    self._progress(f"learning; step {self.trainer.steps}", min(1.0, done / whole))
        except LogGap as error:
            raise LogGap(f"{error}; {self.choices}") from error
        finally:
            fetcher.close()
        self._finish(drained=not live and not self._stopping.is_set())
        return self.summary()

    def stop(self) -> None:
        """Ends `run` at the next turn, with a checkpoint."""
        self._stopping.set()

    def close(self) -> None:
        """Lets the next learner have the partitions and the model."""
        while self._closing:
            self._closing.pop()()

    def _patience(self, live: bool, since: float) -> float:
        if not live or not len(self.stream.ready):
            return _TICK
        return max(0.0, min(_TICK, since + self.learning.max_delay_seconds - time.monotonic()))

    def _fetcher(self, ends: Mapping[int, int] | None) -> Fetcher:
        return Fetcher(self.source, self.positions, self.learning.chunk, until=ends, after=self.turn)

    def _take(self, chunk: Fetched, live: bool) -> None:
        """A drained log is read by its own order alone: no clock makes a partition idle."""
        assert isinstance(chunk, Chunk)
        with self.spent("joining"):
            self.stream.take(chunk, time.monotonic() if live else 0.0)
        self.positions[chunk.partition] = chunk.next
        self.turn = chunk.partition
        self._items_changed()
        self.metrics.read(self.stream.counts, self.stream.newest, self.stream.watermark)

    def _items_changed(self) -> None:
        self.model.items_changed(self.stream.catalogue, self.stream.changed_rows)
        self.stream.changed_rows.clear()

    def _train_whole(self) -> bool:
        """Every whole batch -> whether there was one."""
        trained = False
        while self.stream.ready.longest >= self.learning.batch_size and not self._stopping.is_set():
            self.batches.take(self.stream.ready.pop(self.learning.batch_size))
            trained = True
            self._checkpoint_if_due()
        return trained

    def _give_due(self) -> None:
        if self.giving is not None and self.giving.due(self.trainer.touched):
            self.giving.delta(self._learnt(), self.judge)

    def _writing(self, bundle: Bundle) -> ExamplesWritten:
        target = self._sibling("examples")
        return ExamplesWritten(target, bundle.encoder, bundle.schema.tasks, self._key_of, self._stopping.wait)

    def _key_of(self, examples: Examples) -> str:
        """Copies have the key of the first, so that one reader gets both."""
        return ",".join(map(str, self.partitions))

    # ------------------------------------------------------------------------------------------- between turns
    def _between(self, fetcher: Fetcher) -> None:
        self._give_due()
        if self.giving is not None:
            self._begin_anew_if_left(self.giving)
            if self.giving.bundle(self._learnt(), self.judge, figures_of(self), due=True):
                self.save()
        self._checkpoint_if_due()
        self.metrics.stands(len(self.stream.ready), len(self.stream.pending), fetcher.paused, fetcher.lag())
        self.metrics.checkpoint_age.set(self.saves.age)

    def _begin_anew_if_left(self, giving: Giving) -> None:
        """From the bundle that is current now, at the positions where this learner stands."""
        bundle = giving.anew()
        if bundle is None:
            return
        if schema_id(bundle.encoder) != schema_id(self.stream.encoder):
            raise BundleError(
                f"{bundle.path}: it is current now, and it reads features otherwise than the bundle before: what waits "
                f"to be joined cannot teach it; start again: {CHOICES}"
            )
        self.stream.turn_to(bundle)
        steps = self.trainer.steps
        self.model = self.batches.model = TrainedModel(bundle, self.config, self.plugins, self.stream.catalogue)
        self.trainer.steps = steps
        self.judge.validation.clear()
        self.save()

    def _learnt(self) -> Learnt:
        model = self.model
        return Learnt(
            model.trainer, model.calibration, model.retrieval, self.stream.catalogue, self.newest, self.positions
        )

    # ------------------------------------------------------------------------------------------- checkpoints
    def _checkpoint_if_due(self) -> None:
        if self.saves.due(self.stream.counts["events"]):
            self.save()

    def save(self) -> Path | None:
        """Writes a checkpoint now; None where the disk does not take it: the one before stays."""
        since = time.monotonic()
        with self.spent("checkpoints"):
            if self.batches.audit is not None:
                self.batches.audit.sync()
                self.counts["audited"] = self.batches.audit.length
            arrays = {
                **self.model.arrays(),
                "stream": self.stream.state(),
                "judge": self.judge.arrays(),
                "digest": {} if self.digest is None else self.digest.state(),
                "outbox": {} if self.giving is None else self.giving.outbox(),
            }
            return self.saves.write(
                self.model.tensors(),
                arrays,
                self._state(),
                since=since,
                positions=self.positions,
                step=self.trainer.steps,
                events=self.stream.counts["events"],
            )

    def _state(self) -> dict[str, Any]:
        return state_of(self)

    # ------------------------------------------------------------------------------------------------- the end
    def _finish(self, *, drained: bool) -> None:
        """Gives out and keeps what there is."""
        if self.giving is not None:
            self.giving.delta(self._learnt(), self.judge)
            self._begin_anew_if_left(self.giving)
            if drained and self.trainer.steps:
                self.giving.bundle(self._learnt(), self.judge, figures_of(self))
            self.giving.end()
        elif self.trainer.steps and (target := self.out / "bundle").resolve() != self.bundle.path.resolve():
            with self.spent("bundles"):
                grow(target, self.bundle, self._learnt(), self.plugins, figures_of(self), replace=True)
        self.save()
        counts = {**self.summary()["examples"], "seconds": dict(self.spent.seconds)}
        self.judge.report(self.out / "learning.html", counts, self.bundle.name)

    def summary(self) -> dict[str, Any]:
        """`summary_of` this learner, as it stands."""
        return summary_of(self)
