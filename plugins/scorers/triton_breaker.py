"""Whether Triton is called, and in which of its versions the bundle is."""

from __future__ import annotations

import threading


class Breaker:
    """Of one bundle. Closed, it names the place, Triton's version of the bundle; open, why no call is made.

    It opens after so many failures in a row, and closes only by `mend`. Safe from many threads.
    """

    def __init__(self, failures: int) -> None:
        """Open, as nobody has found the bundle yet."""
        self._most = failures
        self._failed = 0
        self._lock = threading.Lock()
        self._place: str | None = None
        self._why = "not found yet"

    @property
    def place(self) -> str | None:
        """None while it is open."""
        return self._place

    @property
    def why(self) -> str:
        """The reason of the newest failure."""
        return self._why

    def worked(self) -> None:
        """A call went well: what failed before it does not count."""
        self._failed = 0

    def failed(self, reason: str) -> bool:
        """A call failed -> whether that opened it."""
        with self._lock:
            self._why = reason
            if self._place is None:
                return False
            self._failed += 1
            if self._failed < self._most:
                return False
            self._place = None
            return True

    def mend(self, place: str) -> None:
        """The bundle scores there: calls are made again."""
        with self._lock:
            self._place, self._failed = place, 0
