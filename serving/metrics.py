"""Prometheus metrics: base units, one prefix, and never an id of a user or an item as a label."""

from __future__ import annotations

import math
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from engine.components.measures import Durations
from engine.intake import Received
from engine.pipeline import Answer
from engine.plugins import Plugins
from engine.streaming.deltas.follower_status import Applied
from serving.freshness import Freshness
from serving.scrape import scraped
from serving.service import Service

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_LAGS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0, 3600.0)
_SIZES = tuple(4.0**n for n in range(5, 15))
_ROWS = tuple(10.0**n for n in range(7))
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MEDIA_TYPE = CONTENT_TYPE_LATEST


class _PluginErrors(Collector):
    """What the plugin manager counts, read at scrape time."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily(
            "plexrank_plugin_errors", "Moment hooks that failed and were skipped", labels=("hook", "plugin", "kind")
        )
        for labels, count in dict(self.plugins.errors).items():
            family.add_metric(list(labels), count)
        return [family]


class _Stream(Collector):
    """What the service counts of the event log, read at scrape time."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        counts = self.service.logged
        return [
            CounterMetricFamily("plexrank_rankings_logged", "Answers that are in the event log", counts.logged),
            CounterMetricFamily("plexrank_rankings_unlogged", "Answers that are not", counts.unlogged),
            CounterMetricFamily("plexrank_events_dead", "Events that the log will never take", self.service.dead),
            GaugeMetricFamily("plexrank_events_spooled", "Events that wait for the log", self.service.waiting),
        ]


class _Scorer(Collector):
    """What the scorer counts, read at scrape time."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        scorer, found = self.service.scorer, []
        for measure in scorer.measures():
            family = _FAMILIES[measure.kind](
                f"plexrank_{measure.name}", measure.text, labels=("scorer", *measure.labels)
            )
            for labels, value in measure.values.items():
                if isinstance(value, Durations):
                    family.add_metric((scorer.name, *labels), value.buckets(), value.sum)
                else:
                    family.add_metric((scorer.name, *labels), value)
            found.append(family)
        return found


_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Metrics:
    """One registry an application, so that several in one process do not mix."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = r = CollectorRegistry()
        r.register(_PluginErrors(service.plugins))
        r.register(_Stream(service))
        r.register(_Scorer(service))
        self.requests = Histogram(
            "plexrank_request_duration_seconds",
            "From the first byte of a request to the end of its answer",
            ("route", "method", "status"),
            buckets=_SECONDS,
            registry=r,
        )
        self.stages = Histogram(
            "plexrank_stage_duration_seconds", "Stages of the pipeline", ("stage",), buckets=_SECONDS, registry=r
        )
        self.degraded = Counter("plexrank_degraded", "Answers that lost a part", ("reason",), registry=r)
        self.items = Histogram(
            "plexrank_ranked_items", "Items in an answer", buckets=(1, 10, 50, 100, 200, 500, 1000, 2000), registry=r
        )
        self.prediction = Histogram(
            "plexrank_prediction_ratio",
            "Score of the first item",
            buckets=tuple(n / 10 for n in range(1, 11)),
            registry=r,
        )
        self.shed = Counter("plexrank_shed", "Requests refused because the queue was full", registry=r)
        self.events = Counter("plexrank_events", "Events by what became of them", ("result",), registry=r)
        self.swaps = Counter("plexrank_bundle_loads", "Bundles loaded or refused", ("result",), registry=r)
        self.model = Gauge("plexrank_model_info", "The model that serves", ("model", "version"), registry=r)
        self.lag = Histogram(
            "plexrank_event_lag_seconds",
            "From an event to where it is used: forward, in the log after it waited here; delta, trained and applied",
            ("stage",),
            buckets=_LAGS,
            registry=r,
        )
        self.delta_bytes = Histogram("plexrank_delta_bytes", "A delta on its way", buckets=_SIZES, registry=r)
        self.delta_rows = Histogram("plexrank_delta_rows", "Rows that a delta changed", buckets=_ROWS, registry=r)
        self.delta_apply = Histogram("plexrank_delta_apply_seconds", "Applying a delta", buckets=_SECONDS, registry=r)
        newest = Histogram(
            "plexrank_newest_event_age_seconds",
            "With each answer: since the newest event that its model was trained on",
            buckets=_LAGS,
            registry=r,
        )
        fresh = Histogram(
            "plexrank_freshness_seconds",
            "From the newest event of a delta to the first answer that contains it",
            buckets=_LAGS,
            registry=r,
        )
        self.freshness = Freshness(fresh.observe, newest.observe)
        self.scrapes = Counter(
            "plexrank_scorer_scrapes", "Readings of the metrics of the server that scores", ("result",), registry=r
        )
        self.loaded = Gauge("plexrank_model_loaded_timestamp_seconds", "When it was loaded", registry=r)

    def answered(self, route: str, method: str, status: int, begin: float) -> None:
        """begin: of time.monotonic()."""
        method = method if method in _METHODS else "other"
        self.requests.labels(route, method, str(status)).observe(time.monotonic() - begin)

    def ranked(self, answer: Answer) -> None:
        """Stage times, losses, size and the top score of one answer."""
        for stage, seconds in answer.stages.items():
            self.stages.labels(stage).observe(seconds)
        for reason in answer.degraded:
            self.degraded.labels(reason.partition(":")[0]).inc()
        self.items.observe(len(answer.items))
        self.freshness.answered(answer.version)
        if len(answer.scores):
            self.prediction.observe(float(answer.scores[0]))

    def received(self, received: Received) -> None:
        for status in ("accepted", "duplicate", "refused"):
            self.events.labels(status).inc(received.count(status))
        for reason in received.degraded:
            self.degraded.labels(reason.partition(":")[0]).inc()

    def applied(self, applied: Applied) -> None:
        """A learner's delta was taken."""
        self.delta_bytes.observe(applied.bytes)
        self.delta_rows.observe(applied.rows)
        self.delta_apply.observe(applied.seconds)
        if not math.isnan(applied.newest):
            self.lag.labels("delta").observe(max(0.0, time.time() - applied.newest))
        self.freshness.applied(applied)

    def serves(self, model: str, version: str) -> None:
        """Another bundle serves from now on."""
        self.freshness.swapped()
        self.model.clear()
        self.model.labels(model, version).set(1)
        self.loaded.set_to_current_time()

    def render(self) -> bytes:
        """Ours, and behind them those of the server that scores where there is one. Blocks for that one."""
        url = self._service.scorer.metrics_url
        if url is None:
            return generate_latest(self.registry)
        others = scraped(url)
        self.scrapes.labels("failed" if others is None else "taken").inc()
        return generate_latest(self.registry) + (others or b"")
