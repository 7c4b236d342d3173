"""Interactions that came before their ranking."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.data.encoding import ranges
from engine.streaming.join.columns import Columns

_TAIL = 4096


def _columns() -> Columns:
    return Columns(request=np.int64, item=np.int64, decides=np.int32, seconds=np.float64, number=np.int64)


class WaitingInteractions:
    """Kept by request until their ranking comes or their time is up.

    The older ones are sorted by request, the newest few stand behind them as they came. decides: tasks that the
    interaction makes positive, a bit each. number: counts interactions as they come.
    """

    def __init__(self) -> None:
        self._sorted, self._tail = _columns(), _columns()
        self._gone = np.zeros(0, bool)  # of the sorted ones
        self._came = 0
        self._earliest = np.inf  # no later than the earliest of those that wait

    def __len__(self) -> int:
        return len(self._sorted) - int(self._gone.sum()) + len(self._tail)

    def add(self, request: np.ndarray, item: np.ndarray, decides: np.ndarray, seconds: np.ndarray) -> None:
        count = len(request)
        if not count:
            return
        number = np.arange(self._came, self._came + count)
        self._tail.append(count, request=request, item=item, decides=decides, seconds=seconds, number=number)
        self._came += count
        self._earliest = min(self._earliest, float(seconds.min()))
        if len(self._tail) > _TAIL:
            self._merge()

    def pop(self, requests: np.ndarray) -> dict[str, np.ndarray] | None:
        """Takes out the interactions of these requests, distinct int64 [n] -> columns in the order that they came."""
        wanted = np.sort(requests)
        begin = np.searchsorted(self._sorted["request"], wanted, side="left")
        end = np.searchsorted(self._sorted["request"], wanted, side="right")
        old = ranges(begin, end - begin)
        old = old[~self._gone[old]]
        new = _among(self._tail["request"], wanted)
        if not len(old) and not new.any():
            return None
        taken = {
            name: np.concatenate([self._sorted[name][old], self._tail[name][new]])
            for name in ("request", "item", "decides", "seconds", "number")
        }
        self._gone[old] = True
        self._tail.keep(~new)
        order = np.argsort(taken["number"])
        return {name: column[order] for name, column in taken.items()}

    def expire(self, limit: float) -> int:
        """Drops those that happened before `limit`, seconds -> how many."""
        if self._earliest >= limit:
            return 0
        before = len(self)
        self._merge()
        self._sorted.keep(self._sorted["seconds"] >= limit)
        self._gone = np.zeros(len(self._sorted), bool)
        self._earliest = float(self._sorted["seconds"].min()) if len(self._sorted) else np.inf
        return before - len(self)

    def trim(self, limit: int) -> int:
        """Drops the oldest beyond `limit`, by time and then as they came -> how many."""
        excess = len(self) - limit
        if excess <= 0:
            return 0
        self._merge()
        oldest = np.lexsort((self._sorted["number"], self._sorted["seconds"]))[:excess]
        kept = np.ones(len(self._sorted), bool)
        kept[oldest] = False
        self._sorted.keep(kept)
        self._gone = np.zeros(len(self._sorted), bool)
        return excess

    def _merge(self) -> None:
        order = np.argsort(self._tail["request"], kind="stable")
        self._sorted.keep(~self._gone)
        places = np.searchsorted(self._sorted["request"], self._tail["request"][order], side="right")
        merged = {
            name: np.insert(self._sorted[name], places, self._tail[name][order])
            for name in ("request", "item", "decides", "seconds", "number")
        }
        self._sorted, self._tail = _columns(), _columns()
        self._sorted.append(len(merged["request"]), **merged)
        self._gone = np.zeros(len(self._sorted), bool)

    def state(self) -> dict[str, np.ndarray]:
        self._merge()
        return self._sorted.state("waiting") | {"waiting.came": np.array([self._came])}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self._sorted, self._tail = _columns(), _columns()
        self._sorted.load("waiting", state)
        self._gone = np.zeros(len(self._sorted), bool)
        self._came = int(state["waiting.came"][0])
        self._earliest = float(self._sorted["seconds"].min()) if len(self._sorted) else np.inf


def _among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [n]: which values are in `wanted`, sorted and not empty."""
    return wanted[np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)] == values
