"""retrieve -> merge -> filter -> rank -> rerank, by a deadline, with reasons.

A stage that fails or is late costs quality, never the answer: without the store a user has no history, without a source
there are fewer candidates, without the scorer the order is that of the sources or of popularity. What was lost is named
in `degraded` as `stage: why` or `stage.plugin: why`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from engine.candidates import Merged, merge, wrong_candidates
from engine.components import Candidates, Scorer, Scores, StateStore, UserState
from engine.deadline import Deadline, Late
from engine.errors import RequestError, SchemaError, ScorerError
from engine.inference.signature import CANDIDATES
from engine.plugins import Plugins
from engine.relay import Relay, Stage
from engine.served import Served
from engine.turns import Turns

log = logging.getLogger("plexrank.pipeline")

_WAITING_THREADS = 4
"""Threads beside the scoring ones, for requests that wait for a store or a source."""

UNFIT_FEATURES = "state: stored features do not fit the model"
"""In `degraded` where the user was ranked without them."""

STATE_SHARE, RETRIEVE_SHARE, FILTER_SHARE, RANK_SHARE = 0.35, 0.6, 0.7, 0.95
"""How much of the deadline may be used when a stage ends."""

T = TypeVar("T")
Steps = Generator[Stage, Any, T]
"""A part of a request: yields the calls that may stall, gets their outcomes, returns its own."""


@dataclass
class Query:
    """Who asks, and by when. history: item ids, newest first, in place of the stored; features, context: by name."""

    request_id: str
    deadline: Deadline
    user: str = ""
    history: Sequence[str] | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """Items best first. tasks: task -> float32 [n] (of all tasks, where there are several); times in seconds."""

    request_id: str
    user: str
    model: str
    version: str
    items: list[str]
    scores: np.ndarray
    tasks: dict[str, np.ndarray]
    propensity: np.ndarray
    degraded: list[str]
    stages: dict[str, float]
    took: float
    trace: Trace


@dataclass
class Trace:
    """What is needed to explain an answer later: the state that was ranked with, and per item its sources and rules."""

    state: UserState
    query: Query
    item_features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sources: list[list[str]] = field(default_factory=list)
    rules: list[list[str]] = field(default_factory=list)


class _Run:
    """One request on its way: stage times and what was lost."""

    def __init__(self, query: Query, served: Served) -> None:
        self.query, self.served, self.deadline = query, served, query.deadline
        self.stages: dict[str, float] = {}
        self.degraded: list[str] = []
        self._mark = time.perf_counter()

    def ended(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = now - self._mark
        self._mark = now

    def lost(self, where: str, error: BaseException | str) -> None:
        """Notes a failure; the log has it in full, the answer in short."""
        if isinstance(error, Late):
            why = "deadline"
        elif isinstance(error, str):
            why = error
        elif isinstance(error, ScorerError):  # it says in the log itself when it begins to fail
            why = error.reason
            log.debug("request %s: %s: %s", self.query.request_id, where, error)
        else:
            why = type(error).__name__
            log.warning("request %s: %s: %s: %s", self.query.request_id, where, why, error)
        self.degraded.append(f"{where}: {why}")


class Pipeline:
    """Answers requests over one `Served`, which `swap` replaces. Safe from many threads."""

    def __init__(
        self,
        served: Served,
        scorer: Scorer,
        store: StateStore,
        plugins: Plugins,
        *,
        threads: int = 1,
        items: int = 2000,
        filter_seen: bool = True,
    ) -> None:
        """threads: requests that are scored at once; items: most candidates that are ranked."""
        self.served, self.scorer, self.store, self.plugins = served, scorer, store, plugins
        self.items, self.filter_seen = items, filter_seen
        self._turns = Turns(threads)
        self._relay = Relay(threads + _WAITING_THREADS)

    def swap(self, served: Served) -> None:
        """New requests use it from now on."""
        self.served = served

    def close(self) -> None:
        self._relay.close()

    # --------------------------------------------------------------------------------------------- requests
    def rank(self, query: Query, items: Sequence[str], item_features: Mapping[str, Sequence[Any]]) -> Answer:
        """Orders the given items. RequestError for features that the model does not know or cannot read."""
        answer: Answer = self.begin(self.ranking(query, items, item_features)).result()
        return answer

    def recommend(self, query: Query, count: int, exclude: Sequence[str] = ()) -> Answer:
        """Finds, filters, ranks and re-orders -> at most `count` items."""
        answer: Answer = self.begin(self.recommendation(query, count, exclude)).result()
        return answer

    def begin(self, steps: Steps[Any], finish: Callable[[Any], Any] | None = None) -> Future[Any]:
        """Takes a request up -> the future of its answer, or of what `finish` makes of it in the same thread."""

        def flow() -> Steps[Any]:
            answer = yield from steps
            return answer if finish is None else finish(answer)

        return self._relay.begin(flow())

    def admit(self, steps: Steps[Any], items: int, deadline: Deadline, finish: Callable[[Any], Any]) -> Future[Any]:
        """As `begin`, unless those ahead would keep the scorer busy until it is too late for so many items.

        Then RequestError (503): a refusal costs next to nothing, so that the others are answered in time.
        """
        if not self._turns.take(items, deadline.at(RANK_SHARE)):
            raise RequestError("too many requests are ahead to be answered in time; try again soon", status=503)
        future = self.begin(steps, finish)
        future.add_done_callback(lambda _: self._turns.give_back(items))
        return future

    def ranking(self, query: Query, items: Sequence[str], item_features: Mapping[str, Sequence[Any]]) -> Steps[Answer]:
        """The steps of `rank`."""
        run = _Run(query, self.served)
        run.served.check_features(query.features, query.context, item_features, len(items))
        state = yield from self._user(run)
        scored = yield from self._score(run, state, items, item_features)
        scores, tasks = (_popularity(run.served, items), {}) if scored is None else _first_task(run.served, scored)
        order = np.argsort(-scores, kind="stable")
        run.ended("rank")
        places = order.tolist()
        trace = Trace(state, query)
        trace.item_features = {name: [values[p] for p in places] for name, values in item_features.items()}
        trace.sources, trace.rules = [["request"]] * len(items), [[]] * len(items)
        return self._answer(run, scored, [items[p] for p in places], scores[order], _taken(tasks, order), trace)

    def recommendation(self, query: Query, count: int, exclude: Sequence[str] = ()) -> Steps[Answer]:
        """The steps of `recommend`."""
        run = _Run(query, self.served)
        run.served.check_features(query.features, query.context, {}, 0)
        state = yield from self._user(run)
        request = {"count": count, "features": query.features, "context": query.context, "exclude": exclude}
        merged = yield from self._retrieve(run, state, request, count)
        merged, items = yield from self._filter(run, state, request, merged)
        scored = (yield from self._score(run, state, items, {})) if items else None
        scores, tasks = (merged.fallback, {}) if scored is None else _first_task(run.served, scored)
        order = np.argsort(-scores, kind="stable")
        run.ended("rank")
        order, rules = yield from self._rerank(run, merged.rows, scores, order, count)
        trace = Trace(state, query)
        names = [name for name, _, _ in run.served.sources]
        trace.sources = [merged.named(int(p), names) or ["popularity"] for p in order]
        trace.rules = [rules.get(int(p), []) for p in order]
        return self._answer(run, scored, [items[p] for p in order], scores[order], _taken(tasks, order), trace)

    def inferring(self, inputs: Mapping[str, np.ndarray], deadline: Deadline) -> Steps[Mapping[str, np.ndarray]]:
        """The scorer's tensors for one request's; no part of it is made up for. RequestError (504) if it is late."""
        until = deadline.at(RANK_SHARE)

        def infer() -> Mapping[str, np.ndarray]:
            with self._turns.of(len(inputs.get(CANDIDATES, ())), until):
                return self.scorer.infer(inputs, until)

        try:
            outputs: Mapping[str, np.ndarray] = yield Stage("rank", until, infer)
        except Late:
            raise RequestError("the scorer did not answer in time", status=504) from None
        return outputs

    def _answer(
        self,
        run: _Run,
        scored: Scores | None,
        items: list[str],
        scores: np.ndarray,
        tasks: dict[str, np.ndarray],
        trace: Trace,
    ) -> Answer:
        bundle = run.served.bundle
        return Answer(
            request_id=run.query.request_id,
            user=run.query.user,
            model=scored.model if scored else bundle.name,
            version=scored.version if scored else bundle.version,
            items=items,
            scores=scores,
            tasks=tasks if len(tasks) > 1 else {},
            propensity=np.ones(len(items)),  # the order is a function of the request: no item had another chance
            degraded=run.degraded,
            stages=run.stages,
            took=time.monotonic() - run.deadline.begin,
            trace=trace,
        )

    # ----------------------------------------------------------------------------------------------- stages
    def _user(self, run: _Run) -> Steps[UserState]:
        """The user's state once a request, whatever the number of candidates; a history in the request replaces it."""
        query = run.query
        state = UserState(query.user)
        if query.user:
            try:
                state = yield Stage("state", run.deadline.at(STATE_SHARE), self.store.get, (query.user,))
            except Exception as error:
                run.lost("state", error)
        if query.history is not None:
            state.history, state.times = list(query.history), [0] * len(query.history)
            state.seen = [*query.history, *state.seen]
        run.ended("state")
        return state

    def _retrieve(self, run: _Run, state: UserState, request: Mapping[str, Any], count: int) -> Steps[Merged]:
        """One source after another, each with its share of the time. With none at all: the popular items."""
        served, sources = run.served, run.served.sources
        unwanted = len(request["exclude"]) + (len(state.seen) if self.filter_seen else 0)
        found: list[tuple[int, Candidates]] = []
        for number, (name, k, source) in enumerate(sources):
            until = run.deadline.at(STATE_SHARE + (RETRIEVE_SHARE - STATE_SHARE) * (number + 1) / len(sources))
            try:
                candidates = yield Stage(f"retrieve.{name}", until, source.candidates, (state, request, k + unwanted))
                wrong = wrong_candidates(candidates, len(served.catalogue))
                if wrong:
                    log.warning("candidate source %s: %s", name, wrong)
                    run.lost(f"retrieve.{name}", "wrong answer")
                else:
                    found.append((number, candidates))
            except Exception as error:
                run.lost(f"retrieve.{name}", error)
        run.ended("retrieve")
        if found:
            merged = merge(found, self.items + unwanted)
        else:
            if sources:
                run.lost("retrieve", "popularity in place of all sources")
            rows = served.popular[: max(count, 100) + unwanted]
            merged = merge([(len(sources), Candidates(rows, np.zeros(len(rows), np.float32)))], len(rows))
        run.ended("merge")
        return merged

    def _filter(
        self, run: _Run, state: UserState, request: Mapping[str, Any], merged: Merged
    ) -> Steps[tuple[Merged, list[str]]]:
        """Leaves out what was seen, what the request excludes and what plugins do not allow -> (rest, its ids)."""
        ids = run.served.catalogue.ids(merged.rows)
        unwanted = set(request["exclude"])
        if self.filter_seen:
            unwanted.update(state.seen, state.history)
        keep = np.fromiter((item not in unwanted for item in ids), dtype=bool, count=len(ids))
        if self.plugins.listens("filter_candidates"):
            try:
                ask = (run.query.user, ids, request)
                allowed, failed = yield Stage("filter", run.deadline.at(FILTER_SHARE), self.plugins.keep, ask)
                keep &= allowed
                for plugin in failed:
                    run.lost(f"filter.{plugin}", "skipped")
            except Exception as error:
                run.lost("filter", error)
        kept = np.flatnonzero(keep)[: self.items]
        run.ended("filter")
        return merged.take(kept), [ids[p] for p in kept]

    def _score(
        self, run: _Run, state: UserState, items: Sequence[str], item_features: Mapping[str, Sequence[Any]]
    ) -> Steps[Scores | None]:
        """Scores of the items, or None where the scorer fails, is late or does not answer a finite number an item."""
        until = run.deadline.at(RANK_SHARE)
        try:
            try:
                scored: Scores = yield self._scoring_stage(run, state, items, item_features, until)
            except SchemaError as error:
                if not state.features:
                    raise RequestError(str(error)) from error
                run.lost(*UNFIT_FEATURES.split(": "))
                bare = UserState(state.user, {}, state.history, state.times, state.seen)
                scored = yield self._scoring_stage(run, bare, items, item_features, until)
        except SchemaError as error:
            raise RequestError(str(error)) from error
        except RequestError:
            raise
        except Exception as error:
            run.lost("rank", error)
            return None
        for task, values in scored.tasks.items():
            if values.shape != (len(items),) or not np.isfinite(values).all():
                log.error("scorer %s: task %s: not one finite score an item", self.scorer.name, task)
                run.lost("rank", "scores are not finite")
                return None
        for why in scored.degraded:
            run.lost("rank", why)
        return scored

    def _scoring_stage(
        self,
        run: _Run,
        state: UserState,
        items: Sequence[str],
        item_features: Mapping[str, Sequence[Any]],
        until: float,
    ) -> Stage:
        request = run.served.score_request(
            state,
            items,
            features=run.query.features,
            context=run.query.context,
            item_features=item_features,
            deadline=until,
        )

        def score() -> Scores:
            with self._turns.of(len(items), until):
                return self.scorer.score(request)

        return Stage("rank", until, score)

    def _rerank(
        self, run: _Run, rows: np.ndarray, scores: np.ndarray, order: np.ndarray, count: int
    ) -> Steps[tuple[np.ndarray, dict[int, list[str]]]]:
        """Rerankers one after another over `order` (positions, best first); the last cuts to `count`."""
        rules: dict[int, list[str]] = {}
        last = len(run.served.rerankers) - 1
        for number, (name, reranker) in enumerate(run.served.rerankers):
            k = count if number == last else len(order)
            try:
                chosen, applied = yield Stage(
                    f"rerank.{name}", run.deadline.at(1.0), reranker.rerank, (rows[order], scores[order], k)
                )
                if not _is_choice(chosen, len(order)):
                    raise ValueError(f"reranker {name} answered positions that are not distinct or not in range")
                named = [(int(order[position]), rule) for position, rule in applied.items()]
            except Exception as error:
                run.lost(f"rerank.{name}", error)
                continue
            for position, rule in named:
                rules.setdefault(position, []).append(rule)
            order = order[np.asarray(chosen, dtype=np.int64)]
        run.ended("rerank")
        return order[:count], rules


def _popularity(served: Served, items: Sequence[str]) -> np.ndarray:
    """A score for want of a model's: log of an item's positives, as a share of the largest -> float32 [n] in [0, 1]."""
    counts = np.zeros(len(items))
    rows = served.catalogue.rows(items)
    counts[rows >= 0] = served.context.counts[rows[rows >= 0]]
    logs = np.log1p(counts)
    return (logs / max(1.0, float(logs.max(initial=0.0)))).astype(np.float32)


def _first_task(served: Served, scored: Scores) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The first task ranks."""
    first = served.schema.tasks[0]
    return scored.tasks.get(first, next(iter(scored.tasks.values()))), scored.tasks


def _taken(tasks: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    return {task: values[order] for task, values in tasks.items()}


def _is_choice(chosen: Any, n: int) -> bool:
    positions = np.asarray(chosen)
    if positions.ndim != 1 or (len(positions) and not np.issubdtype(positions.dtype, np.integer)):
        return False
    return len(np.unique(positions)) == len(positions) and bool(((positions >= 0) & (positions < n)).all())
