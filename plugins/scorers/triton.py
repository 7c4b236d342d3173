"""Scorer `triton`: inference in a Triton server, over gRPC."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.bundle import Bundle
from engine.catalogue import ArrowCatalogue
from engine.components import Catalogue, PluginOptions, Scorer, ScoreRequest, Scores
from engine.components.measures import Measure
from engine.components.serving import SCORED_BY
from engine.errors import BundleError, PlexrankError, RequestError, ScorerError
from engine.hookspecs import hookimpl
from engine.inference.signature import CANDIDATES, VERSION, Signature
from engine.inference.tensors import checked
from engine.streaming.deltas.apply import Step
from engine.streaming.deltas.delta import Delta
from plugins.scorers.inproc import InprocScorer
from plugins.scorers.triton_answer import CallFailed
from plugins.scorers.triton_link import Link
from plugins.scorers.triton_loaded import Loaded
from plugins.scorers.triton_options import TritonOptions
from plugins.scorers.triton_spare import Spare

log = logging.getLogger("plexrank.triton")

_SPARE = 0.05
"""Share of a request's time that no call gets: threads wait for each other, and clocks differ."""
_FIRST_SECONDS = 2.0
"""How long a server that has a copy of its own waits for Triton when it starts."""
_HEALTH_SECONDS = 1.0


class TritonScorer(Scorer):
    """Scores in Triton, where `plexrank triton deploy` has put the bundle; a copy in this process stands in for it.

    Each request names the Triton version that holds the bundle loaded here, and each answer is checked: its shape, its
    numbers, the bundle that made it. Where Triton is slow, gone or wrong, the copy scores in what is left of the
    request's time, and the answer says so. After some failures in a row Triton is no more asked until a thread beside
    the requests has found it well.

    The deltas of a learner reach Triton by the process beside it (`plexrank triton follow`): `apply` brings only the
    copy up to date, and without a copy it checks no more than whether a delta follows. Answers say what scored them.
    """

    name = "triton"
    Options = TritonOptions
    options: TritonOptions

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options)
        self._loaded: Loaded | None = None
        self._link = Link(self.options, lambda: self._loaded)
        self._copy = Spare(InprocScorer(self.options.inproc)) if self.options.fallback == "inproc" else None
        self._loading = threading.Lock()  # one bundle at a time
        self._changing = threading.Lock()  # one writer at a time; readers take no lock

    @property
    def version(self) -> str:
        """Of the bundle that is loaded, and behind it the newest delta heard of; an answer says what scored it."""
        return self._now().chain.version

    # ---------------------------------------------------------------------------------------------- requests
    def score(self, request: ScoreRequest) -> Scores:
        """SchemaError for a value that cannot be read, ScorerError where neither Triton nor a copy gives scores."""
        loaded, n = self._now(), len(request.items)
        if not n:
            return Scores(_nothing(loaded), loaded.bundle.name, loaded.chain.version)
        tensors = loaded.told(request)
        try:
            answer = self._link.ask(loaded, tensors, self._time_for(n, request.deadline))
        except CallFailed as failure:
            copy = self._instead(failure, n, request.deadline)
            scores = copy.timed(n, lambda: copy.scorer.score(request))
            return replace(scores, degraded=(*scores.degraded, self._stands_in(failure.reason)))
        return Scores(answer.tasks, loaded.bundle.name, answer.version)

    @property
    def signature(self) -> Signature:
        """Of the bundle that is loaded."""
        return self._now().signature

    def infer(self, tensors: Mapping[str, np.ndarray], deadline: float | None = None) -> dict[str, np.ndarray]:
        """As `score`, for a request that comes as tensors."""
        loaded = self._now()
        fit = checked(tensors, loaded.signature)
        n = len(fit[CANDIDATES])
        if not n:
            return _nothing(loaded) | {VERSION: _text(loaded.chain.version)}
        told = {name: values for name, values in loaded.whole(fit).items() if len(values)}
        try:
            answer = self._link.ask(loaded, told, self._time_for(n, deadline))
        except CallFailed as failure:
            copy = self._instead(failure, n, deadline)
            return copy.timed(n, lambda: copy.scorer.infer(fit))
        return {**answer.tasks, VERSION: _text(answer.version)}

    def _time_for(self, n: int, deadline: float | None) -> float:
        """Seconds for a call, so that the copy can still score n items after it: these, and those of the calls that are
        under way, which may fail together. It gets at most half; one that cannot be in time with that gets nothing."""
        if deadline is None:
            return self.options.timeout_ms / 1e3
        left = (1.0 - _SPARE) * (deadline - time.monotonic())
        copy = self._copy
        if copy is None or copy.seconds(n, 0) > left / 2:
            return left
        return left - min(left / 2, copy.seconds(n, self._link.calling))

    def _instead(self, failure: CallFailed, n: int, deadline: float | None) -> Spare:
        """The copy, where there is one and it can score n items in time; else ScorerError."""
        copy = self._copy
        if copy is None or not copy.in_time(n, deadline):
            raise ScorerError(str(failure), f"{self.name}: {failure.reason}") from failure
        self._link.stood_in()
        return copy

    def _stands_in(self, reason: str) -> str:
        return f"{self.name}: {reason}{SCORED_BY}{self.options.fallback}"

    # ------------------------------------------------------------------------------------------ beside requests
    def explain(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """By the copy in this process. RequestError (409) where there is none."""
        if self._copy is None:
            raise RequestError(
                "scorer 'triton' holds no model in this process to explain with: set its option fallback: inproc",
                status=409,
            )
        return self._copy.scorer.explain(request)

    def health(self) -> None:
        """A real inference by Triton; where it fails by the copy. Raises where neither scores."""
        loaded = self._now()
        try:
            self._link.ask(loaded, loaded.told(loaded.probe), _HEALTH_SECONDS)
        except CallFailed as failure:
            self._instead(failure, 0, None).scorer.health()

    def degraded(self) -> Sequence[str]:
        """Why Triton is not asked at the moment."""
        breaker = self._now().breaker
        if breaker.place is not None:
            return ()
        return (f"{self.name}: {breaker.why}" if self._copy is None else self._stands_in(breaker.why),)

    def measures(self) -> Sequence[Measure]:
        """Calls, failures by reason, answers of the copy, how long calls took, whether Triton is asked."""
        return self._link.measures()

    @property
    def metrics_url(self) -> str | None:
        return self.options.metrics_url

    # ----------------------------------------------------------------------------------------------- changes
    def load(self, bundle: Path) -> None:
        """Waits for Triton to serve the bundle, then takes it here. BundleError where it does not in `load_timeout_s`.

        A server that begins with a copy of its own does not wait for long: Triton is found later. The bundle that is
        loaded already is read again without asking Triton. Deltas begin anew.
        """
        with self._loading:
            opened = Bundle.open(bundle, verify=self._copy is None)
            opened.check_parts()
            loaded, before = Loaded.of(opened, self.options.breaker.failures), self._loaded
            if before is None or before.base != loaded.base:
                self._wait_for(loaded, patient=before is not None or self._copy is None)
            with self._changing:  # only now: items and deltas do not wait for Triton
                if self._copy is not None:
                    self._copy.scorer.load(bundle)
                    self._copy.warm(loaded.probe)
                before = self._loaded
                self._loaded = loaded.again(before) if before is not None and before.base == loaded.base else loaded
            self._link.watch()

    def _wait_for(self, loaded: Loaded, *, patient: bool) -> None:
        """BundleError where Triton does not score by it; where one need not be patient, it begins without."""
        seconds = self.options.load_timeout_s
        try:
            self._link.wait_for(loaded, seconds if patient else min(seconds, _FIRST_SECONDS))
        except CallFailed as failure:
            url, bundle = self.options.url, loaded.bundle
            remedy = (
                f"Triton at {url} does not serve {bundle.name} {bundle.version} as '{self._link.model(loaded)}' "
                f"({failure.reason}: {failure}): is it up? plexrank triton deploy {bundle.path} REPOSITORY --url {url}"
            )
            if patient:
                raise BundleError(remedy) from failure
            loaded.breaker.failed(failure.reason)
            log.warning("begins without Triton, which is looked for on and on: %s", remedy)

    def apply(self, delta: Delta) -> None:
        """Into the copy; Triton has it from the process beside it."""
        with self._changing:
            loaded = self._now()
            if loaded.chain.step(delta) is not Step.KNOWN:
                if self._copy is not None:
                    self._copy.scorer.apply(delta)
                self._loaded = replace(loaded, chain=loaded.chain.after(delta))

    def items_changed(self, version: str, catalogue: Catalogue, rows: np.ndarray | None) -> None:
        """Requests that hold one of these items send all items' features along: Triton has those of the bundle."""
        if not isinstance(catalogue, ArrowCatalogue):
            raise TypeError(f"scorer 'triton' reads an ArrowCatalogue, not {type(catalogue).__name__}")
        with self._changing:
            loaded = self._now()
            if version != loaded.base:
                return
            if self._copy is not None:
                self._copy.scorer.items_changed(version, catalogue, rows)
            self._loaded = loaded.grown(catalogue, rows)

    def close(self) -> None:
        """Ends the thread and the connection."""
        self._link.close()

    def _now(self) -> Loaded:
        loaded = self._loaded
        if loaded is None:
            raise PlexrankError("no bundle is loaded")
        return loaded


def _nothing(loaded: Loaded) -> dict[str, np.ndarray]:
    return {task: np.empty(0, np.float32) for task in loaded.tasks}


def _text(version: str) -> np.ndarray:
    return np.frombuffer(version.encode(), np.uint8)


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [TritonScorer]
