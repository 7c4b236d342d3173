"""How old what the model has learned is when an answer is given, and how long an event takes to get there."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from engine.streaming.deltas.delta import parsed
from engine.streaming.deltas.follower_status import Applied

_MOST = 1000


class Freshness:
    """Deltas that were applied and that no answer has shown yet. Thread-safe.

    first: hears, once a delta, of the seconds from the event time of its newest event to the first answer that
    contains it. age: hears with each answer of the seconds since the newest event that its model was trained on.
    """

    def __init__(self, first: Callable[[float], None], age: Callable[[float], None]) -> None:
        self._first, self._age = first, age
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, int, int, float]] = deque(maxlen=_MOST)
        self.newest: float | None = None  # event time of the newest event trained; of what was applied last

    def applied(self, applied: Applied) -> None:
        if math.isnan(applied.newest):  # nothing was trained, as of a first delta that only says what is there
            return
        base, epoch, sequence = parsed(applied.version)
        with self._lock:
            self._waiting.append((base, epoch, sequence, applied.newest))
            self.newest = applied.newest

    def swapped(self) -> None:
        """Another bundle serves: what was learned behind the one before is not in it."""
        with self._lock:
            self._waiting.clear()
            self.newest = None

    def answered(self, version: str, now: float | None = None) -> None:
        """An answer of this version was given."""
        newest = self.newest
        if newest is None:
            return
        now = time.time() if now is None else now
        self._age(max(0.0, now - newest))
        if not self._waiting:
            return
        base, epoch, sequence = parsed(version)
        with self._lock:
            while self._waiting and self._waiting[0][0] == base and self._waiting[0][1:3] <= (epoch, sequence):
                _, of_epoch, _, event = self._waiting.popleft()
                if of_epoch == epoch:  # else its chain was left before anybody saw it
                    self._first(max(0.0, now - event))
