"""How far event time has come: no event older than the watermark is waited for.

Event time stands in the events, so it stops where they stop: the last windows would wait for the next visitor. Where
every partition is idle it goes on with this machine's time, from the newest event: watermark = newest - lateness +
(time since the last event came - idle). Where the clock that is given stands still, events alone move it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Watermarks:
    """The least of the partitions' newest event times, less `lateness`; it never goes back.

    lateness: seconds that events of one partition may be out of order. idle: seconds of this machine's time after which
    a silent partition no longer holds the others up, and event time goes on where all are silent. Between two calls
    this machine's time goes on by idle / 2 at most,
    and never back: a clock that jumps, or a process that stood still, makes no partition idle at once.
    """

    def __init__(self, lateness: float, idle: float) -> None:
        self.lateness, self.idle = lateness, idle
        self._partitions = np.empty(0, np.int64)
        self._newest = np.empty(0)
        self._silent = np.empty(0)
        self._finished = np.empty(0, bool)
        self._value = -np.inf
        self._now: float | None = None

    def observe(self, partition: int, newest: float, now: float) -> None:
        """Events of a partition came, the newest at this event time; nan: only that the partition is to be waited for.

        now: this machine's time in seconds.
        """
        self._tick(now)
        place = self._place(partition)
        if newest == newest:
            self._newest[place] = max(self._newest[place], newest)
            self._silent[place] = 0.0
            self._finished[place] = False

    def finish(self, partition: int) -> None:
        """The partition is at its end: it is not waited for until something comes of it."""
        self._finished[self._place(partition)] = True

    def forget(self, partition: int) -> None:
        """The partition is another reader's now."""
        kept = self._partitions != partition
        self._partitions, self._newest = self._partitions[kept], self._newest[kept]
        self._silent, self._finished = self._silent[kept], self._finished[kept]

    def value(self, now: float) -> float:
        """Seconds since 1970; -inf while a partition that is waited for has brought nothing.

        Where none is waited for, the newest event of all counts, and the time since then beyond `idle`.
        """
        self._tick(now)
        waited = ~self._finished & (self._silent <= self.idle)
        if waited.any():
            value = float(self._newest[waited].min())
        else:
            value = float(self._newest.max(initial=-np.inf))
            value += max(0.0, float(self._silent.min(initial=np.inf)) - self.idle) if len(self._silent) else 0.0
        self._value = max(self._value, value - self.lateness)
        return self._value

    def state(self) -> dict[str, np.ndarray]:
        return {
            "partitions": self._partitions.copy(),
            "newest": self._newest.copy(),
            "silent": self._silent.copy(),
            "finished": self._finished.copy(),
            "value": np.array([self._value]),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self._partitions = np.array(state["partitions"], np.int64)
        self._newest, self._silent = np.array(state["newest"], float), np.array(state["silent"], float)
        self._finished = np.array(state["finished"], bool)
        self._value, self._now = float(state["value"][0]), None

    def _tick(self, now: float) -> None:
        if self._now is not None:
            self._silent += min(max(now - self._now, 0.0), self.idle / 2)
        self._now = now

    def _place(self, partition: int) -> int:
        found = np.flatnonzero(self._partitions == partition)
        if len(found):
            return int(found[0])
        self._partitions = np.append(self._partitions, partition)
        self._newest, self._silent = np.append(self._newest, -np.inf), np.append(self._silent, 0.0)
        self._finished = np.append(self._finished, False)
        return len(self._partitions) - 1
