"""Why an item stands where it stands: kept in short for the newest answers, computed when somebody asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from engine.errors import RequestError
from engine.pipeline import Answer, Pipeline, Trace
from engine.schema import Schema

MOST_ITEMS = 200
"""Items of an answer that can be explained."""


@dataclass(frozen=True)
class Reason:
    """history: (item id, weight of the interest model), in the history's order; empty without an interest model."""

    item: str
    score: float
    position: int
    history: list[tuple[str, float]]
    sources: list[str]
    rules: list[str]


@dataclass(frozen=True)
class Explanation:
    """version made the scores, explained_by the weights: they differ where a bundle was swapped in between."""

    request_id: str
    user: str
    model: str
    version: str
    explained_by: str
    degraded: list[str]
    reasons: list[Reason]


@dataclass(frozen=True)
class _Kept:
    user: str
    model: str
    version: str
    items: list[str]
    scores: np.ndarray
    degraded: list[str]
    trace: Trace


class Explanations:
    """The newest `capacity` answers by request id. Thread-safe."""

    def __init__(self, pipeline: Pipeline, capacity: int = 1000) -> None:
        self.pipeline, self.capacity = pipeline, capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def keep(self, answer: Answer) -> None:
        """Keeps the head of an answer; the oldest answer goes. Nothing here holds a bundle that was swapped out."""
        n, whole = MOST_ITEMS, answer.trace
        trace = Trace(
            whole.state,
            whole.query,
            {name: values[:n] for name, values in whole.item_features.items()},
            whole.sources[:n],
            whole.rules[:n],
        )
        kept = _Kept(
            answer.user,
            answer.model,
            answer.version,
            answer.items[:n],
            answer.scores[:n].copy(),
            answer.degraded,
            trace,
        )
        with self._lock:
            self._kept[answer.request_id] = kept
            self._kept.move_to_end(answer.request_id)
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)

    def forget(self, user: str) -> None:
        """Drops a user's answers."""
        with self._lock:
            for request_id in [r for r, kept in self._kept.items() if kept.user == user]:
                del self._kept[request_id]

    def explain(self, request_id: str, items: int) -> Explanation:
        """The first `items` of an answer. RequestError (404) if it is no longer kept."""
        with self._lock:
            kept = self._kept.get(request_id)
        if kept is None:
            raise RequestError(f"no answer of that request id is kept (the newest {self.capacity} are)", status=404)
        trace, shown = kept.trace, kept.items[:items]
        served = self.pipeline.served
        request = served.score_request(
            trace.state,
            shown,
            features=trace.query.features,
            context=trace.query.context,
            item_features={name: values[:items] for name, values in trace.item_features.items()},
            deadline=None,
        )
        weights = self._weights(served.schema, self.pipeline.scorer.explain(request)) if shown else None
        past = trace.state.history
        return Explanation(
            request_id=request_id,
            user=kept.user,
            model=kept.model,
            version=kept.version,
            explained_by=served.bundle.version,
            degraded=kept.degraded,
            reasons=[
                Reason(
                    item=item,
                    score=float(kept.scores[n]),
                    position=n + 1,
                    history=[] if weights is None else list(zip(past, map(float, weights[n]), strict=False)),
                    sources=trace.sources[n],
                    rules=trace.rules[n],
                )
                for n, item in enumerate(shown)
            ],
        )

    @staticmethod
    def _weights(schema: Schema, found: dict[str, np.ndarray]) -> np.ndarray | None:
        """float32 [N, H] over the history of items: of the sequence of item ids, else of any."""
        for sequence in schema.sequences:
            if sequence.name in found and sequence.of and schema[sequence.of].column == schema.item:
                return found[sequence.name]
        return next(iter(found.values()), None)
