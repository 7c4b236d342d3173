"""What a learner tells Prometheus; no id is ever a label."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 60.0)
_AGES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0, 3600.0)
_SIZES = tuple(4.0**n for n in range(3, 14))


class LearnerMetrics:
    """One registry a learner."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.events = Counter(
            "plexrank_learner_events",
            "Events read: rankings, interactions, items, users, duplicates, dead",
            ["outcome"],
            registry=r,
        )
        self.examples = Counter(
            "plexrank_learner_examples",
            "Examples taken, by kind: positive, negative, correction, presumed, settled",
            ["kind"],
            registry=r,
        )
        self.waiting = Gauge("plexrank_learner_waiting", "Joined examples that wait to be trained", registry=r)
        self.pending = Gauge("plexrank_learner_pending", "Impressions whose features are kept", registry=r)
        self.lag = Gauge("plexrank_learner_lag_records", "Records behind the newest", ["partition"], registry=r)
        self.lag_seconds = Histogram(
            "plexrank_learner_lag_seconds", "Event time to when it was read", buckets=_AGES, registry=r
        )
        self.age = Histogram(
            "plexrank_learner_trained_age_seconds",
            "Event time to when a step with it was done",
            buckets=_AGES,
            registry=r,
        )
        self.newest = Gauge("plexrank_learner_newest_trained_seconds", "Event time of the newest trained", registry=r)
        self.watermark = Gauge(
            "plexrank_learner_watermark_delay_seconds", "Newest event read less the watermark", registry=r
        )
        self.batch = Histogram(
            "plexrank_learner_batch_seconds", "A step, scoring included", buckets=_SECONDS, registry=r
        )
        self.checkpoint = Histogram(
            "plexrank_learner_checkpoint_seconds", "Writing a checkpoint", buckets=_SECONDS, registry=r
        )
        self.checkpoint_age = Gauge("plexrank_learner_checkpoint_age_seconds", "Since the last one", registry=r)
        self.checkpoints_failed = Counter("plexrank_learner_checkpoints_failed", "Not written", registry=r)
        self.paused = Gauge("plexrank_learner_paused", "Times that fetching waited for the learner", registry=r)
        self.published = Histogram(
            "plexrank_learner_publish_seconds", "Making and publishing a delta", buckets=_SECONDS, registry=r
        )
        self.delta_rows = Histogram("plexrank_learner_delta_rows", "Rows in a delta", buckets=_SIZES, registry=r)
        self.delta_bytes = Histogram("plexrank_learner_delta_bytes", "Bytes of a delta", buckets=_SIZES, registry=r)
        self.held = Counter("plexrank_learner_held_back", "Deltas that the guard held back", registry=r)
        self._counted: dict[str, int] = {}

    def read(self, counts: Mapping[str, int], newest: float, watermark: float) -> None:
        """counts: totals, which only grow. newest: event time of the newest event read, nan where there is none."""
        for outcome in ("rankings", "interactions", "items", "users", "duplicates", "dead"):
            more = counts.get(outcome, 0) - self._counted.get(outcome, 0)
            if more > 0:
                self.events.labels(outcome).inc(more)
            self._counted[outcome] = counts.get(outcome, 0)
        if math.isfinite(newest):
            self.lag_seconds.observe(max(0.0, time.time() - newest))
            if math.isfinite(watermark):
                self.watermark.set(newest - watermark)

    def trained(self, kinds: Mapping[str, int], newest: float, seconds: float) -> None:
        """A step: examples by kind, event time of its newest, and how long it took."""
        for kind, count in kinds.items():
            self.examples.labels(kind).inc(count)
        self.age.observe(max(0.0, time.time() - newest))
        self.newest.set(newest)
        self.batch.observe(seconds)

    def stands(self, waiting: int, pending: int, paused: int, lag: Mapping[int, int]) -> None:
        self.waiting.set(waiting)
        self.pending.set(pending)
        self.paused.set(paused)
        for partition, records in lag.items():
            self.lag.labels(str(partition)).set(records)

    def serve(self, port: int) -> None:
        """Answers on the loopback address only."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)


class Stages:
    """Where a learner's time goes: `with stages("training"): ...` adds to `seconds["training"]`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
