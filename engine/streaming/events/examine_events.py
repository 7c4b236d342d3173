"""What a file of events is good for: whether all can be read, and what a learner would miss in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from engine.events import Event, EventLimits, InteractionData, RankingData
from engine.hashing import fingerprint
from engine.streaming.events.import_events import Tally, read_events

_MOST_REMEMBERED = 5_000_000
"""Events whose ids and rankings are compared with those before."""


@dataclass(frozen=True)
class Check:
    """One line of the result. status: PASS, WARN (a learner gets less out of it) or FAIL (events are lost)."""

    name: str
    status: str
    detail: str


@dataclass
class _Seen:
    kinds: Counter[str] = field(default_factory=Counter)
    users: set[int] = field(default_factory=set)
    ids: set[int] = field(default_factory=set)
    rankings: set[int] = field(default_factory=set)
    twice: int = 0
    backwards: int = 0
    first: int | None = None
    last: int | None = None
    newest: int = 0
    joined: int = 0
    named: int = 0
    bare: int = 0

    def take(self, event: Event) -> None:
        self.kinds[event.kind] += 1
        self.users.add(fingerprint(event.key))
        pair = fingerprint(f"{event.source}\x00{event.id}")
        self.twice += pair in self.ids
        if len(self.ids) < _MOST_REMEMBERED:
            self.ids.add(pair)
        self.backwards += event.seconds < self.newest
        self.newest = max(self.newest, event.seconds)
        self.first = event.seconds if self.first is None else min(self.first, event.seconds)
        self.last = event.seconds if self.last is None else max(self.last, event.seconds)
        if isinstance(event.data, RankingData):
            self.bare += event.data.user_features is None and event.data.history is None
            if len(self.rankings) < _MOST_REMEMBERED:
                self.rankings.add(fingerprint(event.data.request_id))
        elif isinstance(event.data, InteractionData) and event.data.ranking is not None:
            self.named += 1
            self.joined += fingerprint(event.data.ranking) in self.rankings


def examine(path: Path, limits: EventLimits, tally: Tally) -> list[Check]:
    """Reads a whole file. tally: gets what was refused, by line. DataError where it cannot be read at all."""
    seen = _Seen()
    for event in read_events(path, limits, tally):
        seen.take(event)
    return list(_checks(seen, tally))


def _checks(seen: _Seen, tally: Tally) -> Iterator[Check]:
    total = tally.good + tally.refused
    yield Check("events can be read", "PASS" if total and not tally.refused else "FAIL", f"{tally.good:,} of {total:,}")
    if seen.first is None or seen.last is None:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.kinds.items()))
    yield Check("kinds", "PASS", f"{kinds}, of {len(seen.users):,} keys, {_day(seen.first)} to {_day(seen.last)}")
    yield _warns("each (source, id) comes once", seen.twice, "come again and count once")
    yield _warns("times rise", seen.backwards, "are older than one before: the join's lateness has to cover that")
    interactions, rankings = seen.kinds["interaction"], seen.kinds["ranking"]
    if interactions:
        missing = interactions - seen.named
        yield _warns("interactions name their ranking", missing, "name none, and are joined to nothing")
        if rankings:
            yield _warns("their rankings are in the file", seen.named - seen.joined, "name one that is not before them")
    if rankings:
        yield _warns("rankings hold what was scored with", seen.bare, "hold neither features nor history as served")


def _warns(name: str, count: int, what: str) -> Check:
    return Check(name, "WARN" if count else "PASS", f"{count:,} {what}" if count else "")


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
