"""Events that were seen before, by the fingerprint of their (source, id)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.streaming.join.print_index import PrintIndex

_NOBODY = -(1 << 63)
"""Stands where an event was forgotten. One whose fingerprint it is would be new whenever it comes."""


class SeenEvents:
    """The newest `capacity` distinct events; the one that came first is forgotten first. 30 to 90 bytes an event."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ring = np.zeros(16, np.int64)  # the n-th event stands at n % capacity
        self._count = 0
        self._index = PrintIndex()

    def __len__(self) -> int:
        return min(self._count, self.capacity)

    def new(self, prints: np.ndarray) -> np.ndarray:
        """Remembers events int64 [n] -> bool [n]: those not seen before, of twins in one call the first."""
        fresh = np.zeros(len(prints), bool)
        distinct, first = np.unique(prints, return_index=True)
        fresh[first[~self._known(distinct)]] = True
        self._add(prints[fresh])
        return fresh

    def forget(self, prints: np.ndarray) -> None:
        """Events int64 [n] are new again when they come once more."""
        places = self._index.get(prints)
        places = places[self._known(prints)]
        self._ring[places] = _NOBODY

    def _known(self, prints: np.ndarray) -> np.ndarray:
        places = self._index.get(prints)
        known = places >= 0
        known[known] = self._ring[places[known]] == prints[known]
        return known

    def _add(self, prints: np.ndarray) -> None:
        numbers = np.arange(self._count, self._count + len(prints))[-self.capacity :]
        self._count += len(prints)
        prints = prints[-self.capacity :]
        room = min(self._count, self.capacity)
        if room > len(self._ring):
            wider = np.zeros(min(self.capacity, max(room, 2 * len(self._ring))), np.int64)
            wider[: len(self._ring)] = self._ring[: len(wider)]
            self._ring = wider
        places = numbers % self.capacity
        self._ring[places] = prints
        if len(self._index) + len(prints) > 2 * max(self.capacity, 1024):
            prints, places = self._ring[: len(self)], np.arange(len(self))
            self._index.rebuild(prints[prints != _NOBODY], places[prints != _NOBODY])
        else:
            self._index.put(prints[prints != _NOBODY], places[prints != _NOBODY])

    def state(self) -> dict[str, np.ndarray]:
        """Fingerprints, oldest first."""
        order = np.arange(self._count - len(self), self._count) % self.capacity
        return {"seen": self._ring[order]}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces what is remembered; of more than `capacity` the newest stay."""
        self._ring, self._count, self._index = np.zeros(16, np.int64), 0, PrintIndex()
        self._add(np.asarray(state["seen"], np.int64))
