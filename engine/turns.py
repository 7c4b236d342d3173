"""Whose turn it is to score: so many at once, and nobody waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.deadline import Late

FIXED = 50
"""What a scoring costs whatever its items, in items."""

MARGIN = 1.3
"""How much longer than expected a scoring may take."""

_WEIGHT, _LEAP = 0.1, 4.0


class Turns:
    """Places for scorings. Who cannot be done by its time, with those ahead, is turned away at once.

    So under load no place is spent on scores that come too late: as many requests are scored in time as the machine
    can, and the others go on without scores while there is time left. What a scoring takes is learned from those
    before. A free place is always given: else one slow spell would be believed for ever.
    """

    def __init__(self, places: int) -> None:
        self._places = self._free = places
        self._freed = threading.Condition()
        self._waiting = 0
        self._ahead = 0  # items of all that score or wait
        self._taken = 0  # items of all requests that were let in
        self.pace = 0.0  # seconds an item

    def take(self, items: int, until: float) -> bool:
        """Lets a request in, to be scored later, if that can be by `until`; `give_back` when it has its answer."""
        size = FIXED + items
        with self._freed:
            expected = self.pace * (self._taken / self._places + size)
            fits = not self._taken or time.monotonic() + MARGIN * expected <= until
            self._taken += size if fits else 0
        return fits

    def give_back(self, items: int) -> None:
        """A request that was let in has its answer."""
        with self._freed:
            self._taken -= FIXED + items

    @contextmanager
    def of(self, items: int, until: float) -> Iterator[None]:
        """A place while the body runs. until: time.monotonic() by which it has to be done. Raises Late."""
        size = FIXED + items
        with self._freed:
            self._enter(size, until)
        begin = time.monotonic()
        try:
            yield
        finally:
            with self._freed:
                self._learn((time.monotonic() - begin) / size)
                self._ahead -= size
                self._free += 1
                self._freed.notify()

    def _enter(self, size: int, until: float) -> None:
        """Takes a place, at once or when those ahead are done. The lock is held."""
        now = time.monotonic()
        if self._waiting or not self._free:
            expected = self.pace * (self._ahead / self._places + size)
            if now + MARGIN * expected > until:
                raise Late
        self._ahead += size
        self._waiting += 1
        try:
            while not self._free:
                left = until - MARGIN * self.pace * size - time.monotonic()
                if not self._freed.wait(max(0.0, left)) and not self._free:
                    raise Late
        except BaseException:
            self._ahead -= size
            raise
        finally:
            self._waiting -= 1
        self._free -= 1

    def _learn(self, pace: float) -> None:
        """One stall is not a new pace: an observation counts as at most four times the pace before."""
        if self.pace:
            pace = self.pace + _WEIGHT * (min(pace, _LEAP * self.pace) - self.pace)
        self.pace = pace
