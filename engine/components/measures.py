"""What a component counts, as the server's metrics show it."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Durations:
    """Seconds, counted in buckets. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(_SECONDS, seconds)] += 1
            self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are no longer than that), ascending; the last bound is `+Inf`."""
        with self._lock:
            counts = list(self._counts)
        found, below = [], 0
        for bound, count in zip([*map(str, _SECONDS), "+Inf"], counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found


@dataclass(frozen=True)
class Measure:
    """One metric. name: in base units, without the server's prefix and without `_total`.

    values: a value for each label -> a number, or for a histogram its durations. No id of a user or an item.
    """

    name: str
    text: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float | Durations]
