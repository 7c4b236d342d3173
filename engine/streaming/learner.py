"""The learner: events in, a model that follows them out; after a crash it goes on as if there had been none.

A turn takes a chunk of one partition, joins it, and trains every whole batch that is ready. Each batch is scored before
it trains; what is due is published between the two, so that what goes out was judged. Everything that the next turn
depends on is in one checkpoint: weights, optimizers' state, join, examples that wait, positions.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine.batch import Batch
from engine.bundle import Bundle, read_manifest
from engine.components import EventLog
from engine.config import Config
from engine.errors import BundleError, CheckpointError, ConfigError, DeltaGap, LogGap
from engine.plugins import Plugins
from engine.streaming.audit import Audit
from engine.streaming.chain import Chain, Learnt, finite, grow
from engine.streaming.checkpointing import LearnerCheckpoints, Saved
from engine.streaming.dead import DeadLetters
from engine.streaming.drift import Drift
from engine.streaming.emitted import NEGATIVE, POSITIVE
from engine.streaming.fetch import Chunk, Fetcher
from engine.streaming.guard import Guard, Verdict
from engine.streaming.joining import EventsJoined
from engine.streaming.learner_metrics import LearnerMetrics
from engine.streaming.locks import PartitionLocks
from engine.streaming.progress import FrozenBase, ProgressiveValidation
from engine.streaming.publisher import DeltaPublisher
from engine.streaming.ready import Examples
from engine.streaming.registry import ModelRegistry
from engine.streaming.report import write_learning_report
from engine.streaming.retrieval import OnlineRetrieval
from engine.streaming.rows import RowLifetime
from engine.training.online import OnlineTrainer

log = logging.getLogger("plexrank.learning")

ResetTo = Literal["earliest", "latest", "bundle"]
Until = Literal["end", "live"]
Progress = Callable[[str, float], None]

CHOICES = (
    "choose with --reset-to: 'earliest' or 'latest' begin from the bundle at the oldest or the newest record, 'bundle' "
    "at the positions that the bundle was learnt up to"
)
_KINDS = ("positive", "negative", "correction")
_VERDICTS = 1000
_TICK = 0.05


class Learner:
    """One model, one set of partitions, one thread that learns; `stop` may be called from any other."""

    def __init__(
        self,
        config: Config,
        source: EventLog,
        out: Path,
        *,
        plugins: Plugins,
        bundle: Path | None = None,
        registry: ModelRegistry | None = None,
        partitions: Sequence[int] | None = None,
        reset_to: ResetTo | None = None,
        audit: Path | None = None,
        locks: Path | None = None,
        metrics: LearnerMetrics | None = None,
        progress: Progress | None = None,
    ) -> None:
        """config: how to join and learn; the model is the bundle's. out: checkpoints, report and, without a registry,
        the bundle at the end. registry: where deltas and bundles are published, and the model comes from; `bundle`
        begins it where it is empty. partitions: all where None. locks: folder that learners of this log share. Errors:
        BundleError, CheckpointError, LogGap, EventError; each says what to do.
        """
        self.config, self.learning, self.source, self.out = config, config.learning, source, Path(out)
        self.plugins, self.registry = plugins, registry
        self.metrics = metrics or LearnerMetrics()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.verdicts: list[Verdict] = []
        self._progress = progress or (lambda stage, share: None)
        self._stopping = threading.Event()
        self._roll_back_to: tuple[Verdict, str] | None = None
        self._newest = math.nan
        self._chain: Chain | None = None
        self._dead: DeadLetters | None = None
        self._publisher: DeltaPublisher | None = None
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        there = source.ends()
        self.partitions = sorted(there) if partitions is None else sorted(set(partitions))
        if not set(self.partitions) <= set(there):
            raise ConfigError(f"--partitions: the log has {', '.join(map(str, sorted(there)))}")
        self._locks = PartitionLocks(locks if locks is not None else self.out / "locks", self.partitions)
        try:
            self._begin(bundle, reset_to, audit)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------- start
    def _begin(self, given: Path | None, reset_to: ResetTo | None, audit: Path | None) -> None:
        self.checkpoints = LearnerCheckpoints(self.out / "checkpoints", self.learning.keep_checkpoints)
        saved = self.checkpoints.newest() if reset_to in (None, "bundle") else None
        if self.registry is not None:
            self._publisher = self._publishing(self.registry)
        bundle, epoch = self._model(given)
        if bundle.schema != self.config.schema_():
            raise BundleError(f"{bundle.path}: its features or tasks are not the configuration's; train it again")
        previous = saved.state["positions"] if saved is not None and self._same_log(saved) else None
        if reset_to == "bundle":
            saved = None
        if saved is not None:
            self._check(saved, bundle, epoch)
        elif (
            self._publisher is not None and self.registry is not None and self._publisher.reached(bundle.version, epoch)
        ):
            epoch = self.registry.renew("a learner began anew from it").epoch  # followers may be ahead of it
        self._build(bundle, epoch)
        if saved is None:
            self.positions = self._start(bundle, reset_to, previous)
            self._turn, self.learner = -1, uuid.uuid4().hex
        else:
            self._restore(saved)
        self._audit = None if audit is None else Audit(audit, self.counts["audited"])
        self.stream.assign(self.partitions, 0.0)
        self._saved_events = self.stream.counts["events"]
        self._saved_at = time.monotonic()

    def _publishing(self, registry: ModelRegistry) -> DeltaPublisher:
        return DeltaPublisher(
            self.source.sibling("deltas", partitions=1),
            self.source.sibling("models", partitions=1, compact=True),
            registry,
            dtype=self.learning.publish.dtype,
        )

    def _model(self, given: Path | None) -> tuple[Bundle, int]:
        """The bundle to go on from, and the epoch of its chain."""
        if self.registry is None or self._publisher is None:
            if given is None:
                raise BundleError("there is no model to learn on: give --bundle, or --models")
            return Bundle.open(given), 0
        pointer = self.registry.current()
        if pointer is None:
            if given is None:
                raise BundleError(f"{self.registry.root}: no model is current; give --bundle to begin with")
            pointer = self._publisher.publish_bundle(given, self.registry.new_epoch(), "begun")
        return Bundle.open(self.registry.bundle(pointer.version)), pointer.epoch

    def _same_log(self, saved: Saved) -> bool:
        return bool(saved.state["identity"] == self.source.identity)

    def _check(self, saved: Saved, bundle: Bundle, epoch: int) -> None:
        """CheckpointError where the checkpoint is of another log, of other partitions or of a model that was left."""
        state = saved.state
        if not self._same_log(saved):
            raise CheckpointError(
                f"{saved.path}: its positions are of another log ({state['identity']}) than the configured one "
                f"({self.source.identity}); {CHOICES}"
            )
        before = {int(p) for p in state["positions"]}
        if before != set(self.partitions):
            raise CheckpointError(
                f"{saved.path}: it is of partitions {sorted(before)}, not {self.partitions}: a join's state cannot be "
                f"divided; take the same partitions, or another --out, or {CHOICES}"
            )
        if (state["base"], state["epoch"]) == (bundle.version, epoch) or self._own_child(state, bundle):
            return
        raise CheckpointError(
            f"{saved.path}: it was learnt on {state['base']} (epoch {state['epoch']}), and {bundle.version} (epoch "
            f"{epoch}) is the model now; {CHOICES}"
        )

    def _own_child(self, state: dict[str, Any], bundle: Bundle) -> bool:
        """A bundle that this learner published just before it was killed, when the checkpoint was not written yet."""
        if self.registry is None:
            return False
        manifest = read_manifest(bundle.path)
        made_by = (manifest.metrics.get("learning") or {}).get("learner")
        return bool(manifest.parent == state["base"] and made_by == state["learner"])

    def _start(self, bundle: Bundle, reset_to: ResetTo | None, previous: dict[str, int] | None) -> dict[int, int]:
        """partition -> where to begin without a checkpoint."""
        begins, ends = self.source.begins(), self.source.ends()
        if reset_to == "latest":
            return {p: ends[p] for p in self.partitions}
        learnt = bundle.manifest.metrics.get("learning") or {}
        kept = learnt.get("positions") if learnt.get("stream") == self.source.identity else previous
        if reset_to == "earliest" or kept is None:
            if reset_to == "bundle":
                raise BundleError(
                    f"{bundle.path}: it says no positions of this log ({self.source.identity}); begin with --reset-to "
                    "earliest or latest"
                )
            return {p: begins[p] for p in self.partitions}
        return {p: int(kept.get(str(p), begins[p])) for p in self.partitions}

    def _build(self, bundle: Bundle, epoch: int) -> None:
        self.begun_with = bundle
        self._dead = DeadLetters(self.source)
        self.stream = EventsJoined(self.config, bundle, self._dead, stopped=self._stopping.is_set)
        self._take_model(bundle)
        window = self.learning.guard.window
        self.validation = ProgressiveValidation(bundle.schema.tasks, window)
        self.guard = Guard(self.learning.guard, begun_with=bundle.version, on_stop=self._on_stop)
        self._base = FrozenBase(bundle, self.plugins)
        reference = bundle.drift
        self.drift = None if reference is None else Drift(reference, bundle.schema)
        if self._publisher is not None:
            self._chain = Chain(self._publisher, bundle, epoch, self.learning.publish, self.metrics)

    def _take_model(self, bundle: Bundle) -> None:
        """The weights of a bundle, to be trained from here on."""
        self.bundle = bundle
        self.trainer = OnlineTrainer(bundle, self.learning, self.plugins)
        self.rows = RowLifetime(bundle, self.learning, self.trainer)
        self.retrieval: OnlineRetrieval | None = None
        if self.learning.retrieval and bundle.item_vectors is not None:
            self.retrieval = OnlineRetrieval(bundle, self.learning, self.plugins)
            self.retrieval.catalogue = self.stream.catalogue

    def _restore(self, saved: Saved) -> None:
        state = saved.state
        self.stream.load(saved.arrays("stream"))
        if self.retrieval is not None:
            self.retrieval.catalogue = self.stream.catalogue
        saved.read_into(self._tensors())
        self.trainer.load(saved.arrays("trainer"))
        self.rows.load(saved.arrays("rows"))
        if self.retrieval is not None:
            self.retrieval.load(saved.arrays("retrieval"))
        self.validation.load(saved.arrays("validation"))
        self.guard.load(state["guard"])
        drift = saved.arrays("drift")
        if self.drift is not None and drift:
            self.drift.load(drift)
        if self._chain is not None:
            self._chain.load(state["sequence"] if state["base"] == self._chain.base else 0, saved.arrays("outbox"))
        self.positions = {int(p): int(offset) for p, offset in state["positions"].items()}
        self._turn, self.learner = int(state["turn"]), str(state["learner"])
        self.counts = Counter(state["counts"])
        self._newest = math.nan if state["newest"] is None else float(state["newest"])
        log.info("goes on at step %d from %s", self.trainer.steps, saved.path)
        self._progress(f"goes on after {self.trainer.steps} steps", 1.0)

    # ------------------------------------------------------------------------------------------------ running
    def run(self, until: Until = "live") -> dict[str, Any]:
        """Learns until the ends of now, or until `stop` -> `summary`. What was learnt is in a checkpoint on return."""
        ends = self.source.ends() if until == "end" else None
        live = ends is None
        whole = sum(max(0, ends[p] - self.positions[p]) for p in self.partitions) if ends is not None else 0
        begun = sum(self.positions.values())
        fetcher = Fetcher(self.source, self.positions, self.learning.chunk, until=ends, after=self._turn)
        waits_since = time.monotonic()
        try:
            self._train_whole()
            while not self._stopping.is_set():
                with self._spent("waiting"):
                    chunk = fetcher.get(self._patience(live, waits_since))
                if chunk is not None:
                    self._take(chunk, live)
                elif fetcher.done:
                    break
                elif live:
                    self.stream.advance(time.monotonic())
                if self._train_whole() or not len(self.stream.ready):
                    waits_since = time.monotonic()
                if live and time.monotonic() - waits_since >= self.learning.max_delay_seconds:
                    self._train(self.stream.ready.pop(self.learning.batch_size))
                    waits_since = time.monotonic()
                self._between(fetcher)
                if whole:
                    done = sum(self.positions.values()) - begun
                    self._progress(f"learning; step {self.trainer.steps}", min(1.0, done / whole))
        except LogGap as error:
            raise LogGap(f"{error}; {CHOICES}") from error
        finally:
            fetcher.close()
        self._finish(whole_run=not live)
        return self.summary()

    def stop(self) -> None:
        """Ends `run` at the next turn, with a checkpoint."""
        self._stopping.set()

    def close(self) -> None:
        """Lets the next learner have the partitions and the model."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher.deltas.close()
            self._publisher.models.close()
        if self._dead is not None:
            self._dead.close()
        self._locks.release()

    def _patience(self, live: bool, since: float) -> float:
        if not live or not len(self.stream.ready):
            return _TICK
        return max(0.0, min(_TICK, since + self.learning.max_delay_seconds - time.monotonic()))

    def _take(self, chunk: Chunk, live: bool) -> None:
        """A drained log is read by its own order alone: no clock makes a partition idle."""
        with self._spent("joining"):
            self.stream.take(chunk, time.monotonic() if live else 0.0)
        self.positions[chunk.partition] = chunk.next
        self._turn = chunk.partition
        if self.stream.changed_rows and self.retrieval is not None:
            self.retrieval.catalogue = self.stream.catalogue
            self.retrieval.touch(np.unique(np.concatenate(self.stream.changed_rows)))
        self.stream.changed_rows.clear()
        self.metrics.count_events(self.stream.counts)
        newest = self.stream.newest
        if newest == newest:
            self.metrics.lag_seconds.observe(max(0.0, time.time() - newest))
            self.metrics.watermark.set(newest - self.stream.watermark)

    def _train_whole(self) -> bool:
        """Every whole batch -> whether there was one."""
        trained = False
        while len(self.stream.ready) >= self.learning.batch_size and not self._stopping.is_set():
            self._train(self.stream.ready.pop(self.learning.batch_size))
            trained = True
            self._checkpoint_if_due()
        return trained

    def _train(self, examples: Examples) -> None:
        """Judges a batch, gives out what is due, then trains."""
        if not len(examples):
            return
        start = time.monotonic()
        with self._spent("features"):
            batch = self.stream.pending.take(examples.slot)
        with self._spent("judging"):
            self._observe(batch, examples)
        if self._chain is not None and self._chain.due(self.trainer.touched):
            self._publish()
        with self._spent("training"):
            newest = float(examples.seconds.max())
            self._newest = newest if math.isnan(self._newest) else max(self._newest, newest)
            if self._audit is not None:
                self._audit.write(self.trainer.steps, examples)
            self.trainer.step(self.rows.admit(batch, self._newest), examples.labels, examples.weight)
        if self.retrieval is not None:
            with self._spent("retrieval"):
                self._train_retrieval(examples)
        self.stream.pending.release(self.stream.ready.free())
        now = time.time()
        for kind, count in enumerate(np.bincount(examples.kind, minlength=len(_KINDS)).tolist()):
            self.counts[_KINDS[kind]] += count
            self.metrics.examples.labels(_KINDS[kind]).inc(count)
        self.counts["trained"] += len(examples)
        self.metrics.age.observe(max(0.0, now - newest))
        self.metrics.newest.set(self._newest)
        self.metrics.batch.observe(time.monotonic() - start)

    @torch.no_grad()
    def _observe(self, batch: Batch, examples: Examples) -> None:
        logits = self.trainer.score(batch)
        calibration = self.bundle.calibration
        told = np.stack([calibration[t].apply(logits[t]) for t in self.trainer.tasks], axis=1)
        stands_for = np.where(examples.kind == NEGATIVE, examples.weight / examples.rate, examples.weight)
        weight = stands_for.astype(np.float32)
        base = self._base(batch)
        self.validation.observe(examples.labels, told, base, weight, examples.seconds, examples.kind)
        if self.drift is not None:
            self.drift.observe(batch, weight)

    def _train_retrieval(self, examples: Examples) -> None:
        """On what was liked in the ranking task."""
        assert self.retrieval is not None
        liked = (examples.labels[:, 0] == 1) & (examples.kind == POSITIVE)
        if liked.any():
            rows = self.stream.catalogue.rows_of(examples.item[liked])
            self.retrieval.step(self.stream.pending.take(examples.slot[liked]), rows)

    # ------------------------------------------------------------------------------------------- between turns
    def _between(self, fetcher: Fetcher) -> None:
        if self._chain is not None and self._chain.due(self.trainer.touched):
            self._publish()
        if self._roll_back_to is not None:
            self._roll_back(*self._roll_back_to)
        if self._chain is not None and self._chain.bundle_due and not self.guard.stopped:
            self._publish_bundle()
        self._checkpoint_if_due()
        self.metrics.waiting.set(len(self.stream.ready))
        self.metrics.pending.set(len(self.stream.pending))
        self.metrics.paused.set(fetcher.paused)
        for partition, records in fetcher.lag().items():
            self.metrics.lag.labels(str(partition)).set(records)
        self.metrics.checkpoint_age.set(time.monotonic() - self._saved_at)

    def _publish(self) -> None:
        """A delta, where the guard allows it; begins anew where somebody else changed the model."""
        assert self._chain is not None
        verdict = self.guard.judge(self.validation.figures())
        if not self.verdicts or (verdict.ok, verdict.reasons) != (self.verdicts[-1].ok, self.verdicts[-1].reasons):
            self.verdicts = [*self.verdicts[1 - _VERDICTS :], verdict]
        if not verdict.ok:
            if self._chain.held is None:
                log.warning("publishing stops: %s", "; ".join(verdict.reasons))
            self._chain.held = "; ".join(verdict.reasons)
            self.counts["held"] += 1
            self.metrics.held.inc()
            return
        self._chain.held = None
        try:
            with self._spent("publishing"):
                self._chain.publish(self._learnt())
        except DeltaGap as error:
            log.warning("%s", error)
            self._begin_anew()

    def _learnt(self) -> Learnt:
        return Learnt(self.trainer, self.retrieval, self.stream.catalogue, self._newest, self.positions)

    def _publish_bundle(self) -> bool:
        assert self._chain is not None
        with self._spent("bundles"):
            published = self._chain.publish_bundle(self._learnt(), self.out, self.plugins, self._figures())
        if published:
            self.guard.published(self._chain.base, self.validation.figures()["examples"])
            self.counts["bundles"] += 1
            self.plugins.notify(
                "on_publish", bundle=self._chain.bundle.path, manifest=self._chain.bundle.manifest.as_json()
            )
            self.save()
        return published

    def _on_stop(self, verdict: Verdict, good: str) -> None:
        self._roll_back_to = (verdict, good)

    def _roll_back(self, verdict: Verdict, good: str) -> None:
        """The registry goes back to the last good version, and so does this learner; positions go on."""
        self._roll_back_to = None
        if self.registry is None or self._chain is None:
            return
        reason = f"guard: {verdict.reasons[0]}"
        try:
            self.registry.rollback(good, reason=reason)
        except BundleError as error:
            log.error("cannot roll back to %s: %s", good, error)
            return
        log.warning("rolled back to %s: %s", good, reason)
        self.counts["rollbacks"] += 1
        self._begin_anew()

    def _begin_anew(self) -> None:
        """From the bundle that is current, at the positions where this learner stands."""
        assert self.registry is not None
        assert self._chain is not None
        pointer = self.registry.current()
        assert pointer is not None
        bundle = Bundle.open(self.registry.bundle(pointer.version))
        steps = self.trainer.steps
        self._take_model(bundle)
        self.trainer.steps = steps
        self.validation.clear()
        self._chain.begin(bundle, pointer.epoch)
        self.counts["begun_anew"] += 1
        self.save()

    # ------------------------------------------------------------------------------------------- checkpoints
    def _checkpoint_if_due(self) -> None:
        events = self.stream.counts["events"] - self._saved_events
        if self.learning.checkpoint_events is not None:
            due = events >= self.learning.checkpoint_events
        else:
            due = time.monotonic() - self._saved_at >= self.learning.checkpoint_seconds
        if due:
            self.save()

    def save(self) -> Path | None:
        """Writes a checkpoint now; None where the disk does not take it: the one before stays."""
        start = time.monotonic()
        with self._spent("checkpoints"):
            if self._audit is not None:
                self._audit.sync()
                self.counts["audited"] = self._audit.length
            path = self.checkpoints.save(self._tensors(), self._arrays(), self._state())
        self._saved_events, self._saved_at = self.stream.counts["events"], time.monotonic()
        self.metrics.checkpoint.observe(time.monotonic() - start)
        if path is None:
            self.metrics.checkpoints_failed.inc()
            self.counts["checkpoints_failed"] += 1
            return None
        if self.plugins.listens("on_checkpoint"):
            self.plugins.notify("on_checkpoint", path=path, step=self.trainer.steps)
        return path

    def _tensors(self) -> dict[str, Any]:
        return {**self.trainer.tensors(), **({} if self.retrieval is None else self.retrieval.tensors())}

    def _arrays(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            "stream": self.stream.state(),
            "trainer": self.trainer.state(),
            "rows": self.rows.state(),
            "validation": self.validation.state(),
            "drift": {} if self.drift is None else self.drift.state(),
            "retrieval": {} if self.retrieval is None else self.retrieval.state(),
            "outbox": {} if self._chain is None else self._chain.outbox(),
        }

    def _state(self) -> dict[str, Any]:
        chain = {"base": self.bundle.version, "epoch": 0, "sequence": 0}
        return {
            **(chain if self._chain is None else self._chain.state()),
            "learner": self.learner,
            "identity": self.source.identity,
            "positions": {str(p): offset for p, offset in self.positions.items()},
            "turn": self._turn,
            "counts": dict(self.counts),
            "newest": finite(self._newest),
            "guard": self.guard.state(),
        }

    # ------------------------------------------------------------------------------------------------- the end
    def _finish(self, *, whole_run: bool) -> None:
        """Gives out and keeps what there is."""
        if self._chain is None:
            target = self.out / "bundle"
            if target.resolve() != self.bundle.path.resolve() and self.trainer.steps:
                with self._spent("bundles"):
                    grow(target, self.bundle, self._learnt(), self.plugins, self._figures(), replace=True)
        else:
            self._publish()
            if whole_run and self.trainer.steps and not self.guard.stopped:
                self._publish_bundle()
        self.save()
        counts = {**self.summary()["examples"], "seconds": dict(self.seconds)}
        psi = None if self.drift is None else self.drift.psi()
        write_learning_report(
            self.out / "learning.html", self.validation.curve, psi, self.verdicts, counts, title=self.bundle.name
        )

    def _figures(self) -> dict[str, Any]:
        """What a bundle says of how it was learnt."""
        return {
            "learner": self.learner,
            "stream": self.source.identity,
            "positions": {str(p): offset for p, offset in self.positions.items()},
            "steps": self.trainer.steps,
            "trained": self.counts["trained"],
            "newest": finite(self._newest),
        }

    def summary(self) -> dict[str, Any]:
        """Counts that add up: events in = the other counts of `events`; examples joined = trained + waiting."""
        events, joiner = self.stream.counts, self.stream.joiner
        outcomes = ("rankings", "interactions", "items", "users", "duplicates", "dead")
        return {
            "model": self.bundle.name,
            "version": self.bundle.version,
            "steps": self.trainer.steps,
            "events": {"in": events["events"], **{name: events[name] for name in outcomes}},
            "join": dict(joiner.counts),
            "open": joiner.waiting(),
            "examples": {
                "joined": events["examples"],
                "trained": self.counts["trained"],
                "waiting": len(self.stream.ready),
                **{kind: self.counts[kind] for kind in _KINDS},
            },
            "expired": self.rows.expired,
            "published": 0 if self._chain is None else self._chain.published,
            "bundles": self.counts["bundles"],
            "held": self.counts["held"],
            "rollbacks": self.counts["rollbacks"],
            "checkpoints_failed": self.counts["checkpoints_failed"],
            "positions": {str(p): offset for p, offset in sorted(self.positions.items())},
            "newest": finite(self._newest),
            "figures": self.validation.figures(),
            "seconds": {stage: round(its, 3) for stage, its in self.seconds.items()},
        }

    @contextmanager
    def _spent(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
