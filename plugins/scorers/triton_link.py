"""The way to Triton: calls that are checked and counted, where a bundle is found, and who looks when it is lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.components.measures import Measure
from engine.inference.signature import CANDIDATES
from plugins.scorers.triton_answer import Answer, CallFailed
from plugins.scorers.triton_counts import Counts
from plugins.scorers.triton_loaded import Loaded
from plugins.scorers.triton_options import TritonOptions

log = logging.getLogger("plexrank.triton")

_SHORTEST_CALL = 0.0005
_PROBE_SECONDS = 2.0
_LOOK_SECONDS = 0.2
_NEWER_SECONDS = 2.0
_ELSEWHERE = ("not deployed", "other bundle")
"""Failures of one replica among several that the next may not have."""
_NEWEST = ""
"""In place of a version's number."""


class Link:
    """To one Triton, for whatever bundle is loaded. Safe from many threads."""

    def __init__(self, options: TritonOptions, now: Callable[[], Loaded | None]) -> None:
        """now: the bundle that is loaded. PluginError without tritonclient."""
        from plugins.scorers.triton_client import TritonClient

        self.options = options
        self._client = TritonClient(options)
        self._now = now
        self._counts = Counts()
        self._ended, self._broken, self._looking = threading.Event(), threading.Event(), threading.Lock()
        self._watcher: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------- calls
    def ask(self, loaded: Loaded, tensors: Mapping[str, np.ndarray], timeout: float) -> Answer:
        """Scores by the bundle that is loaded. timeout: seconds, of which there may be none.

        CallFailed: counted, and held against Triton where it is to blame.
        """
        breaker, place = loaded.breaker, loaded.breaker.place
        if place is None:
            self._counts.failed("not asked")
            raise CallFailed(breaker.why, f"Triton at {self.options.url} is left alone: {breaker.why}")
        try:
            answer = self._asked(loaded, place, tensors, timeout)
        except CallFailed as failure:
            self._counts.failed(failure.reason)
            short = failure.reason == "deadline" and 1e3 * timeout < self.options.breaker.least_ms
            if failure.reason != "refused" and not short and breaker.failed(failure.reason):
                log.warning("Triton is left alone for now: %s: %s", failure.reason, failure)
                self._broken.set()
            raise
        breaker.worked()
        return answer

    def measures(self) -> Sequence[Measure]:
        loaded = self._now()
        return self._counts.measures(asked=loaded is not None and loaded.breaker.place is not None)

    @property
    def calling(self) -> int:
        """Calls that are under way."""
        return self._counts.calling

    def stood_in(self) -> None:
        """A copy scored in Triton's place."""
        self._counts.stood_in()

    def _asked(self, loaded: Loaded, place: str, tensors: Mapping[str, np.ndarray], timeout: float) -> Answer:
        """By the version that has the bundle; where that one is gone, by another that has it too, in the same time. At
        last by the newest, whatever its number: replicas that began at different times number a bundle differently."""
        until = time.monotonic() + timeout
        try:
            return self._called(loaded, place, tensors, timeout)
        except CallFailed as failure:
            if failure.reason not in _ELSEWHERE:
                raise
            first = failure
        for version in (self._moved(loaded, place, until), _NEWEST):
            try:
                if version is not None:
                    return self._call(loaded, version, tensors, until - time.monotonic())
            except CallFailed as failure:
                log.debug("Triton: %s: %s", failure.reason, failure)
        raise first

    def _moved(self, loaded: Loaded, gone: str, until: float) -> str | None:
        """The version that has the bundle now: one that was rolled back to is deployed once more, as the newest, and
        its older number makes way. None where there is none, or no time. One request looks, for all others too."""
        if not self._looking.acquire(timeout=max(0.0, until - time.monotonic())):
            return None
        try:
            if loaded.breaker.place == gone:
                loaded.breaker.mend(self._found(loaded, until - time.monotonic(), until))
            return loaded.breaker.place
        except CallFailed as failure:
            log.debug("Triton: %s: %s", failure.reason, failure)
            return None
        finally:
            self._looking.release()

    def _called(self, loaded: Loaded, place: str, tensors: Mapping[str, np.ndarray], timeout: float) -> Answer:
        """One call, and where it met a replica without this bundle, one more."""
        begin = time.monotonic()
        try:
            return self._call(loaded, place, tensors, timeout)
        except CallFailed as failure:
            left = timeout - (time.monotonic() - begin)
            if failure.reason not in _ELSEWHERE or left < _SHORTEST_CALL:
                raise
            return self._call(loaded, place, tensors, left)

    def _call(self, loaded: Loaded, place: str, tensors: Mapping[str, np.ndarray], timeout: float) -> Answer:
        if timeout < _SHORTEST_CALL:
            raise CallFailed("deadline", "no time is left to ask Triton")
        n = len(tensors[CANDIDATES])
        with self._counts.call():
            answer = self._client.infer(self.model(loaded), place, tensors, loaded.tasks, n, timeout)
        if answer.base != loaded.base:
            raise CallFailed("other bundle", f"Triton's version {place} holds {answer.base}, not {loaded.base}")
        return answer

    def model(self, loaded: Loaded) -> str:
        """The name that the bundle has in Triton."""
        return self.options.model or loaded.bundle.name

    # --------------------------------------------------------------------------------------- a bundle's place
    def wait_for(self, loaded: Loaded, seconds: float) -> None:
        """Looks until Triton scores by the bundle; CallFailed where it does not in that time."""
        until = time.monotonic() + seconds
        while True:
            try:
                loaded.breaker.mend(self._found(loaded, _PROBE_SECONDS))
                return
            except CallFailed:
                if time.monotonic() >= until or self._ended.wait(_LOOK_SECONDS):
                    raise

    def _found(self, loaded: Loaded, seconds: float, until: float = math.inf) -> str:
        """Triton's version that holds the bundle and scores by it, its last call in so many seconds. CallFailed."""
        model, held = self.model(loaded), []

        def left() -> float:
            return min(_PROBE_SECONDS, until - time.monotonic())

        for version in self._client.versions(model, left()):
            try:
                answer = self._client.infer(model, version, loaded.few(), (), 1, left())
            except CallFailed as failure:
                held.append(failure)
                continue
            held.append(CallFailed("not deployed", f"version {version} of '{model}' holds {answer.base}"))
            if answer.base == loaded.base:
                self._called(loaded, version, loaded.told(loaded.probe), seconds)
                return version
        reason = held[0].reason if held else "not deployed"
        raise CallFailed(reason, "; ".join(map(str, held)) or f"no version of '{model}' is ready")

    def watch(self) -> None:
        """From now on a thread looks for the bundle that is loaded: now and then while Triton is left alone, and
        seldom else, as it may have been deployed once more and a learner's deltas reach the newest version only."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="plexrank-triton", daemon=True)
            self._watcher.start()
        self._broken.set()

    def _watch(self) -> None:
        while not self._ended.is_set():
            loaded = self._now()
            try:
                if loaded is None or loaded.breaker.place is not None:
                    if not self._broken.wait(_NEWER_SECONDS) and loaded is not None:
                        self._look_for_newer(loaded)
                    self._broken.clear()
                elif not self._ended.wait(self.options.breaker.pause_s):
                    self._look_again(loaded)
            except Exception:
                log.exception("Triton could not be looked for")

    def _look_again(self, loaded: Loaded) -> None:
        try:
            place = self._found(loaded, self.options.timeout_ms / 1e3)
        except CallFailed as failure:
            loaded.breaker.failed(failure.reason)
            log.debug("Triton: %s: %s", failure.reason, failure)
            if failure.reason == "deadline":
                self._client.renew()
        else:
            loaded.breaker.mend(place)
            log.info("Triton is asked again: version %s of '%s'", place, self.model(loaded))

    def _look_for_newer(self, loaded: Loaded) -> None:
        """Where Triton has a newer version than the one that is asked: whether the bundle is in that one too."""
        place = loaded.breaker.place
        try:
            if place is not None and self._client.versions(self.model(loaded), _PROBE_SECONDS)[:1] != [place]:
                found = self._found(loaded, _PROBE_SECONDS)
                if found != place and loaded.breaker.place == place:
                    loaded.breaker.mend(found)
                    log.info("version %s of '%s' is asked from now on", found, self.model(loaded))
        except CallFailed as failure:
            log.debug("Triton: %s: %s", failure.reason, failure)

    def close(self) -> None:
        """Ends the thread and the connection."""
        self._ended.set()
        self._broken.set()
        if self._watcher is not None:
            self._watcher.join(timeout=10.0)
        self._client.close()
