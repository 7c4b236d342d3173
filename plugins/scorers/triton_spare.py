"""The copy of the model in this process, and how long it takes, so that it is asked while there is time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from engine.components import ScoreRequest
from plugins.scorers.inproc import InprocScorer

_FIXED = 50
"""What a scoring costs whatever its items, in items."""
_MARGIN = 1.5
_WEIGHT, _LEAP = 0.1, 4.0
_CORES = os.cpu_count() or 1

T = TypeVar("T")


class Spare:
    """A scorer that stands in, and its pace, learned from each time that it did."""

    def __init__(self, scorer: InprocScorer) -> None:
        self.scorer = scorer
        self._pace = 0.0  # seconds an item
        self._busy = 0
        self._lock = threading.Lock()

    def seconds(self, n: int, beside: int) -> float:
        """What n items may take, together with as many requests `beside` them."""
        return _MARGIN * self._pace * (_FIXED + n) * (1 + beside / _CORES)

    def in_time(self, n: int, deadline: float | None) -> bool:
        """Whether n items can be scored by then. Where not, the pace is doubted a little: a slow spell may be over."""
        if deadline is None or time.monotonic() + self.seconds(n, self._busy) / _MARGIN <= deadline:
            return True
        self._pace *= 1.0 - _WEIGHT
        return False

    def warm(self, probe: ScoreRequest) -> None:
        """Scores a request of usual items, to know the pace of the model that was loaded."""
        self._pace = 0.0
        self.timed(len(probe.items), lambda: self.scorer.score(probe))

    def timed(self, n: int, score: Callable[[], T]) -> T:
        """What it gives; a stall counts as at most four times the pace before."""
        with self._lock:
            self._busy += 1
        begin = time.monotonic()
        try:
            return score()
        finally:
            pace, before = (time.monotonic() - begin) / (_FIXED + n), self._pace
            with self._lock:
                self._busy -= 1
                self._pace = before + _WEIGHT * (min(pace, _LEAP * before) - before) if before else pace
