"""The join once more, one event at a time over dictionaries: what the vectorised one is compared with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Interactions:
    """As `engine.streaming.events.decode.Interactions`."""

    request: np.ndarray
    item: np.ndarray
    type: list[str]
    code: np.ndarray
    seconds: np.ndarray


@dataclass
class Rankings:
    """As `engine.streaming.events.decode.Rankings`, without its data."""

    request: np.ndarray
    seconds: np.ndarray


@dataclass
class Ranking:
    request: int
    seconds: float
    items: list[int]
    slots: list[int | None]
    number: int
    positive: set[tuple[int, int]] = field(default_factory=set)  # (place, task)
    corrected: set[tuple[int, int]] = field(default_factory=set)
    stage: int = 0


Row = tuple[int, int, int, tuple[float, ...], float, int]
"""slot, request, item, labels, seconds, kind"""


class Oracle:
    """Labels: 1, 0, and -1 where a row says nothing."""

    def __init__(
        self,
        windows: Sequence[float],
        types: Mapping[str, set[int]],
        *,
        lateness: float,
        most: int,
        correct: bool,
        keep: Any = lambda request, item: True,
    ) -> None:
        self.windows, self.types, self.correct, self.keep, self.most = windows, types, correct, keep, most
        self.ends = sorted(set(windows))
        self.keeping = self.ends[-1] + lateness
        self.rankings: dict[int, Ranking] = {}
        self.waiting: list[tuple[int, int, set[int], float]] = []
        self.watermark = -math.inf
        self.count: Counter[str] = Counter()
        self.came = 0

    def add(
        self,
        rankings: list[tuple[int, float, list[int]]],
        interactions: list[tuple[int, int, str, float]],
        slots: list[list[int]],
    ) -> tuple[list[Row], set[int], list[int]]:
        rows: list[Row] = []
        freed: list[int] = []
        opened = []
        for (request, seconds, items), mine in zip(rankings, slots, strict=True):
            self.count["rankings"] += 1
            if request in self.rankings:
                self.count["duplicate_rankings"] += 1
                freed += mine
                continue
            ranking = Ranking(request, seconds, [], [], self.came)
            self.came += 1
            for item, slot in zip(items, mine, strict=True):
                if item in ranking.items:
                    self.count["duplicate_items"] += 1
                    freed.append(slot)
                else:
                    self.count["impressions"] += 1
                    ranking.items.append(item)
                    ranking.slots.append(slot)
            self.rankings[request] = ranking
            opened.append(request)
        before, self.waiting = self.waiting, []
        for wait in before:
            if wait[0] in opened:
                self.join(self.rankings[wait[0]], *wait[1:], rows)
            else:
                self.waiting.append(wait)
        foreign = []
        for number, (request, item, kind, seconds) in enumerate(interactions):
            self.count["interactions"] += 1
            tasks = self.types.get(kind, set())
            if not tasks:
                self.count["irrelevant"] += 1
            elif request == 0:
                self.count["unattributed"] += 1
            elif request in self.rankings:
                if self.join(self.rankings[request], item, tasks, seconds, rows):
                    foreign.append(number)
            elif seconds < self.watermark - self.ends[-1]:
                self.count["orphans"] += 1
            else:
                self.waiting.append((request, item, tasks, seconds))
        oldest = sorted(self.rankings.values(), key=lambda r: (r.seconds, r.number))
        early: list[tuple[int, int, Row]] = []
        for ranking in oldest:
            if sum(len(r.items) for r in self.rankings.values() if self.is_open(r)) <= self.most:
                break
            if self.is_open(ranking):
                self.count["early"] += len(ranking.items)
                turn = 0
                while self.is_open(ranking):
                    early += [(turn, ranking.number, row) for row in self.end(ranking, freed)]
                    turn += 1
        rows += [row for _, _, row in sorted(early, key=lambda e: e[:2])]
        while len(self.waiting) > self.most:
            self.waiting.remove(min(self.waiting, key=lambda w: w[3]))
            self.count["orphans"] += 1
        self.tidy(freed)
        return rows, set(freed), foreign

    def advance(self, watermark: float) -> tuple[list[Row], set[int], list[int]]:
        self.watermark = max(self.watermark, watermark)
        freed: list[int] = []
        found: list[tuple[float, int, Row]] = []
        for ranking in self.rankings.values():
            while self.is_open(ranking) and ranking.seconds + self.ends[ranking.stage] < self.watermark:
                end = ranking.seconds + self.ends[ranking.stage]
                found += [(end, ranking.number, row) for row in self.end(ranking, freed)]
        kept = [w for w in self.waiting if w[3] >= self.watermark - self.ends[-1]]
        self.count["orphans"] += len(self.waiting) - len(kept)
        self.waiting = kept
        self.tidy(freed)
        return [row for _, _, row in sorted(found, key=lambda f: f[:2])], set(freed), []

    def is_open(self, ranking: Ranking) -> bool:
        return ranking.stage < len(self.ends)

    def join(self, ranking: Ranking, item: int, tasks: set[int], seconds: float, rows: list[Row]) -> bool:
        if item not in ranking.items:
            self.count["foreign"] += 1
            return True
        place = ranking.items.index(item)
        won, late = set(), set()
        for task in tasks:
            window = self.windows[task]
            if (place, task) in ranking.positive:
                continue
            if seconds <= ranking.seconds + window and ranking.stage <= self.ends.index(window):
                won.add(task)
                ranking.positive.add((place, task))
                self.count[f"positives.{task}"] += 1
            elif (place, task) not in ranking.corrected:
                late.add(task)
                ranking.corrected.add((place, task))
        slot = ranking.slots[place]
        if won:
            rows.append(self.row(ranking, place, won, set(), seconds, 0))
        if late and self.correct and slot is not None:
            rows.append(self.row(ranking, place, late, set(), seconds, 2))
            self.count["corrections"] += 1
        elif late:
            self.count["lost_late"] += 1
        self.count["joined" if won else "late" if late else "repeats"] += 1
        return False

    def end(self, ranking: Ranking, freed: list[int]) -> list[Row]:
        rows = []
        decided = {t for t, window in enumerate(self.windows) if window == self.ends[ranking.stage]}
        for place, item in enumerate(ranking.items):
            zeros = {t for t in decided if (place, t) not in ranking.positive}
            kept = self.keep(ranking.request, item)
            for task in zeros:
                self.count[f"{'negatives' if kept else 'thinned'}.{task}"] += 1
            if zeros and kept:
                rows.append(self.row(ranking, place, set(), zeros, ranking.seconds, 1))
        ranking.stage += 1
        if not self.is_open(ranking) and not self.correct:
            self.give_back(ranking, freed)
        return rows

    def give_back(self, ranking: Ranking, freed: list[int]) -> None:
        freed += [slot for slot in ranking.slots if slot is not None]
        ranking.slots = [None] * len(ranking.slots)

    def tidy(self, freed: list[int]) -> None:
        def oldest(with_slots: bool) -> list[Ranking]:
            ended = [r for r in self.rankings.values() if not self.is_open(r)]
            ended = [r for r in ended if not with_slots or None not in r.slots or not r.slots]
            return sorted(ended, key=lambda r: (r.seconds, r.number))

        def held(rankings: list[Ranking]) -> int:
            return sum(len(r.items) for r in rankings)

        mine = oldest(True)
        while held(mine) > self.most:
            self.give_back(mine.pop(0), freed)
        mine = oldest(False)
        while held(mine) > 2 * self.most:
            self.forget(mine.pop(0), freed)
        for ranking in mine:
            if ranking.seconds < self.watermark - self.ends[-1] - self.keeping:
                self.forget(ranking, freed)

    def forget(self, ranking: Ranking, freed: list[int]) -> None:
        self.give_back(ranking, freed)
        del self.rankings[ranking.request]

    def row(self, ranking: Ranking, place: int, ones: set[int], zeros: set[int], seconds: float, kind: int) -> Row:
        labels = tuple(1.0 if t in ones else 0.0 if t in zeros else -1.0 for t in range(len(self.windows)))
        slot = ranking.slots[place]
        assert slot is not None
        return slot, ranking.request, ranking.items[place], labels, seconds, kind
