"""What the scorer `triton` counts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from engine.components.measures import Durations, Measure


class Counts:
    """Since the start; calling: calls under way. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = self._stood_in = self.calling = 0
        self._failures: Counter[str] = Counter()
        self._seconds = Durations()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call, with an answer or without."""
        begin = time.monotonic()
        with self._lock:
            self._calls += 1
            self.calling += 1
        try:
            yield
        finally:
            self._seconds.observe(time.monotonic() - begin)
            with self._lock:
                self.calling -= 1

    def failed(self, reason: str) -> None:
        """A request had no scores of Triton."""
        with self._lock:
            self._failures[reason] += 1

    def stood_in(self) -> None:
        """The copy scored a request in Triton's place."""
        with self._lock:
            self._stood_in += 1

    def measures(self, *, asked: bool) -> list[Measure]:
        """asked: whether Triton is at the moment."""
        with self._lock:
            failures: dict[tuple[str, ...], float | Durations] = {
                (reason,): float(count) for reason, count in self._failures.items()
            }
        return [
            Measure("scorer_calls", "Calls of the model server", "counter", (), {(): float(self._calls)}),
            Measure("scorer_failures", "Requests that it gave no usable scores for", "counter", ("reason",), failures),
            Measure("scorer_fallbacks", "Requests scored by the copy", "counter", (), {(): float(self._stood_in)}),
            Measure("scorer_call_duration_seconds", "There and back", "histogram", (), {(): self._seconds}),
            Measure("scorer_asked", "1 while the model server is asked, else 0", "gauge", (), {(): float(asked)}),
        ]
