"""What was shown, ranking by ranking: found by request and item, ended by time, forgotten in the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.data.encoding import ranges
from engine.streaming.join.columns import Columns
from engine.streaming.join.deadlines import Deadlines
from engine.streaming.join.print_index import PrintIndex

_COMPARED = 1 << 20
"""About so many items are compared at a time."""
_FEW = 1024
"""So many rankings that are gone are not worth a clean-up."""


class Impressions:
    """A row a ranking and, behind one another, a place for each of its items.

    ends float64 [G]: seconds from a ranking to the ends of its windows, ascending. A ranking at stage g has ended g of
    them: it is open below G, and ended at G. closing int32 [G]: the tasks that each end decides, a bit each.
    Rankings are ended where more than `most` impressions are open (`over`); ended ones give back their features' slots
    where more than `most` have some, or at once unless `keep_slots`, and are forgotten `keeping` seconds after their
    last window, or where there are more than 2 `most`.
    """

    def __init__(self, ends: np.ndarray, closing: np.ndarray, keeping: float, most: int, *, keep_slots: bool) -> None:
        self._ends, self.closing, self._keeping = np.append(ends, np.inf), closing, keeping
        self._most, self._keep_slots = most, keep_slots
        self._rankings = Columns(
            request=np.int64, seconds=np.float64, begin=np.int64, size=np.int64, stage=np.int64,
            slots=bool, alive=bool,
        )  # fmt: skip
        self._places = Columns(item=np.int64, slot=np.int64, positive=np.int32, corrected=np.int32)
        self._freed: list[np.ndarray] = []
        self._build()

    # --------------------------------------------------------------------------------------------- columns
    def of_ranking(self, name: str) -> np.ndarray:
        """request int64, seconds float64, stage int64: a column over rows."""
        return self._rankings[name]

    def of_place(self, name: str) -> np.ndarray:
        """item, slot int64 (-1: given back), positive, corrected int32 bits of tasks: a column over places."""
        return self._places[name]

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The impressions of rankings -> (place int64 [n], row int64 [n])."""
        sizes = self._rankings["size"][rows]
        return ranges(self._rankings["begin"][rows], sizes), np.repeat(rows, sizes)

    def closes(self, rows: np.ndarray) -> np.ndarray:
        """When the next window of each ranking ends, float64; inf where none is open."""
        return self._rankings["seconds"][rows] + self._ends[self._rankings["stage"][rows]]

    # ---------------------------------------------------------------------------------------------- finding
    def find(self, requests: np.ndarray) -> np.ndarray:
        """Rows int64 [n], -1 where the request is not known."""
        rows = self._index.get(requests)
        known = np.flatnonzero(rows >= 0)
        gone = known[~self._rankings["alive"][rows[known]]]
        rows[gone] = -1
        return rows

    def locate(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Places int64 [k] of items in their rankings, -1 where the ranking does not hold the item."""
        found = np.full(len(rows), -1, np.int64)
        begin, sizes = self._rankings["begin"][rows], self._rankings["size"][rows]
        step = np.cumsum(sizes) // _COMPARED
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(step)) + 1):
            places = ranges(begin[part], sizes[part])
            which = np.repeat(part, sizes[part])
            same = self._places["item"][places] == items[which]
            found[which[same]] = places[same]
        return found

    # --------------------------------------------------------------------------------------------- changing
    def open(
        self, requests: np.ndarray, seconds: np.ndarray, sizes: np.ndarray, items: np.ndarray, slots: np.ndarray
    ) -> None:
        """Rankings of requests that are not known, with their items and slots behind one another."""
        count, first = len(requests), len(self._rankings)
        if not count:
            return
        begin = len(self._places) + np.cumsum(sizes) - sizes
        self._rankings.append(
            count, request=requests, seconds=seconds, begin=begin, size=sizes, stage=0, slots=True, alive=True
        )
        self._places.append(len(items), item=items, slot=slots, positive=0, corrected=0)
        self._index.put(requests, np.arange(first, first + count))
        self._closes.append(seconds + self._ends[0])
        self._open.append(seconds)
        for later in (self._with_slots, self._known):
            later.append(np.full(count, np.inf))
        self._count[0] += len(items)

    def due(self, watermark: float) -> np.ndarray:
        """Rankings with a window that ended before the watermark, in the order of those ends."""
        return self._closes.before(watermark)

    def over(self) -> np.ndarray:
        """The oldest open rankings that have to end for the others to be at most as many as may be open."""
        return self._oldest(self._open, self._count[0] - self._most)

    def end_window(self, rows: np.ndarray) -> None:
        """Ends the next window of open rankings."""
        self._rankings["stage"][rows] += 1
        self._closes.set(rows, self.closes(rows))
        ended = rows[self._rankings["stage"][rows] == len(self.closing)]
        if not len(ended):
            return
        seconds, size = self._rankings["seconds"][ended], int(self._rankings["size"][ended].sum())
        self._open.set(ended, np.inf)
        self._with_slots.set(ended, seconds)
        self._known.set(ended, seconds)
        self._count += (-size, size, size)
        if not self._keep_slots:
            self._give_back(ended)

    def tidy(self, watermark: float) -> np.ndarray:
        """Forgets what is over a limit or too old -> slots given back since the last call, int64."""
        self._give_back(self._oldest(self._with_slots, self._count[1] - self._most))
        self._forget(self._oldest(self._known, self._count[2] - 2 * self._most))
        self._forget(self._known.before(watermark - self._ends[-2] - self._keeping))
        gone = len(self._rankings) - self._alive
        if gone > _FEW and 2 * gone > len(self._rankings):
            self._clean()
        freed = np.concatenate([np.empty(0, np.int64), *self._freed])
        self._freed = []
        return freed

    def undecided(self) -> np.ndarray:
        """The tasks of each open impression that are neither positive nor ended, a bit each, int32 [n]."""
        rows = np.flatnonzero(self._rankings["alive"] & (self._rankings["stage"] < len(self.closing)))
        place, row = self.places(rows)
        to_come = np.bitwise_or.accumulate(self.closing[::-1])[::-1]  # what a stage's end and all later ones decide
        return to_come[self._rankings["stage"][row]] & ~self._places["positive"][place]

    def _oldest(self, among: Deadlines, excess: int) -> np.ndarray:
        """The oldest rankings that hold `excess` impressions or a few more."""
        if excess <= 0:
            return np.empty(0, np.int64)
        count = 16
        while True:
            rows = among.first(count)
            held = np.cumsum(self._rankings["size"][rows])
            if len(rows) < count or held[-1] >= excess:
                return rows[: int(np.searchsorted(held, excess)) + 1]
            count *= 4

    def _give_back(self, rows: np.ndarray) -> None:
        """The slots of ended rankings."""
        rows = rows[self._rankings["slots"][rows]]
        if not len(rows):
            return
        places, _ = self.places(rows)
        self._freed.append(self._places["slot"][places])
        self._places["slot"][places] = -1
        self._rankings["slots"][rows] = False
        self._with_slots.set(rows, np.inf)
        self._count[1] -= len(places)

    def _forget(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        self._give_back(rows)
        self._known.set(rows, np.inf)
        self._rankings["alive"][rows] = False
        self._alive -= len(rows)
        self._count[2] -= int(self._rankings["size"][rows].sum())

    # --------------------------------------------------------------------------------------- storage, state
    def _clean(self) -> None:
        rows = np.flatnonzero(self._rankings["alive"])
        places, _ = self.places(rows)
        self._rankings.keep(rows)
        self._places.keep(places)
        self._rankings["begin"][:] = np.cumsum(self._rankings["size"]) - self._rankings["size"]
        self._build()

    def _build(self) -> None:
        """All that follows from the columns."""
        rows = np.arange(len(self._rankings))
        alive, seconds, slots = (self._rankings[name] for name in ("alive", "seconds", "slots"))
        is_open = self._rankings["stage"] < len(self.closing)
        self._alive = int(alive.sum())
        self._index = PrintIndex()
        self._index.rebuild(self._rankings["request"][alive], rows[alive])
        self._closes = Deadlines(np.where(alive, self.closes(rows), np.inf))
        groups = (alive & is_open, alive & ~is_open & slots, alive & ~is_open)
        self._open, self._with_slots, self._known = (Deadlines(np.where(g, seconds, np.inf)) for g in groups)
        self._count = np.array([self._rankings["size"][g].sum() for g in groups], np.int64)

    def state(self) -> dict[str, np.ndarray]:
        self._clean()
        return self._rankings.state("rankings") | self._places.state("impressions")

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self._rankings.load("rankings", state)
        self._places.load("impressions", state)
        self._build()
