"""The copy of the model in this process, and how long it takes, so that it is asked while there is time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from engine.components import ScoreRequest
from plugins.scorers.inproc import InprocScorer

_FIXED = 50
"""What a scoring costs whatever its items, in items."""
_MARGIN = 1.5
_WEIGHT, _LEAP = 0.1, 4.0

T = TypeVar("T")


class Spare:
    """A scorer that stands in, and its pace, learned from each time that it did."""

    def __init__(self, scorer: InprocScorer) -> None:
        self.scorer = scorer
        self._pace = 0.0  # seconds an item

    def seconds(self, n: int) -> float:
        """What n items may take."""
        return _MARGIN * self._pace * (_FIXED + n)

    def in_time(self, n: int, deadline: float | None) -> bool:
        """Whether n items can be scored by then. Where not, the pace is doubted a little: a slow spell may be over."""
        if deadline is None or time.monotonic() + self._pace * (_FIXED + n) <= deadline:
            return True
        self._pace *= 1.0 - _WEIGHT
        return False

    def warm(self, probe: ScoreRequest) -> None:
        """Scores a request of usual items, to know the pace of the model that was loaded."""
        self._pace = 0.0
        self.timed(len(probe.items), lambda: self.scorer.score(probe))

    def timed(self, n: int, score: Callable[[], T]) -> T:
        """What it gives; a stall counts as at most four times the pace before."""
        begin = time.monotonic()
        found = score()
        pace = (time.monotonic() - begin) / (_FIXED + n)
        before = self._pace
        self._pace = before + _WEIGHT * (min(pace, _LEAP * before) - before) if before else pace
        return found
