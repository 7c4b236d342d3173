"""What the Playground shows, as plain values: a ranking beside the one before it, and why each item is there.

Nothing here reads a request, a model or a clock, so every number on the page can be checked by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.components.serving import SCORED_BY

DEGRADED = {
    "state": "what is stored of this user could not be read, or does not fit the model",
    "retrieve": "candidates come from fewer sources than usual",
    "filter": "a filter was skipped",
    "rank": "the model gave no scores; items are in order of popularity",
    "rerank": "a reranker was skipped",
    "explain": "the model's reasons are not available",
    "events": "the event log is away; events are kept on this machine until it is back, and none is lost",
    "deltas": "the model does not learn at the moment; it answers as it was",
}

SCORED_ELSEWHERE = "another copy of the model gave the scores; its newest updates may not be in it"
_MISSING = "part of the answer is missing"

OTHER_MS = 0.05
"""Time outside the stages that is worth a piece of the bar."""


@dataclass(frozen=True)
class Card:
    """What people read of an item: its title and a line of attributes."""

    id: str
    title: str
    detail: str = ""


@dataclass(frozen=True)
class Reason:
    """Why an item is in the list.

    history: (item id, raw weight of the interest model) in the history's order; sources and rules in words.
    """

    history: Sequence[tuple[str, float]] = ()
    sources: Sequence[str] = ()
    rules: Sequence[str] = ()


@dataclass(frozen=True)
class Receipt:
    """An event that is durable in the log at `place` (partition:offset), and the history's length around it.

    place: "" while the log is away and the event waits for it on this machine.
    """

    id: str
    type: str
    user: str
    item: Card
    time: int
    place: str
    history_before: int
    history_after: int


@dataclass(frozen=True)
class Weight:
    """One history item's part in a score.

    Of absolute values, as a weight's sign has no meaning of its own where no softmax normalises: share of their sum,
    bar relative to the largest (0..1).
    """

    card: Card
    value: float
    share: float
    bar: float


@dataclass(frozen=True)
class Row:
    """One line of the ranking. delta: places gained since the list before (None: no list before); new: not in it."""

    key: str
    card: Card
    position: int
    score: float
    bar: float
    tasks: Mapping[str, float]
    weights: Sequence[Weight]
    sources: Sequence[str]
    rules: Sequence[str]
    delta: int | None = None
    change: float | None = None
    new: bool = False

    @property
    def moved(self) -> bool:
        return self.new or bool(self.delta)


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline; `share` is its part of the total (0..1)."""

    name: str
    ms: float
    offset: float
    share: float


@dataclass
class Ranking:
    """A whole answer, ready for the template."""

    user: str
    request_id: str
    model: str
    version: str
    rows: list[Row]
    stages: list[Stage]
    took_ms: float
    degraded: list[tuple[str, str]]
    raw: str
    influence: list[float] = field(default_factory=list)

    @property
    def moved(self) -> int:
        return sum(row.moved for row in self.rows)

    @property
    def shown(self) -> str:
        """What the next request needs to tell what moved: [[id, score], ...] as JSON."""
        return json.dumps([[row.card.id, round(row.score, 6)] for row in self.rows])


def key(item: str) -> str:
    """A name for an item that is safe in an HTML id and stays the same from list to list."""
    return "i" + hashlib.blake2b(item.encode(), digest_size=6).hexdigest()


def weigh(history: Sequence[tuple[str, float]], cards: Mapping[str, Card]) -> list[Weight]:
    """Raw weights -> shares and bars, in the history's order. Non-finite weights count as zero."""
    values = [float(w) if math.isfinite(w) else 0.0 for _, w in history]
    total = sum(abs(v) for v in values) or 1.0
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    return [
        Weight(cards.get(item) or Card(item, item), value, abs(value) / total, round(abs(value) / largest, 4))
        for (item, _), value in zip(history, values, strict=True)
    ]


def parse_shown(text: str, limit: int = 500) -> list[tuple[str, float]]:
    """The list before, as `Ranking.shown` wrote it; anything else counts as no list."""
    try:
        pairs = json.loads(text)
        return [(str(item), float(score)) for item, score in pairs[:limit]]
    except (ValueError, TypeError, RecursionError, KeyError):
        return []


def moves(before: Sequence[str], after: Sequence[str]) -> dict[str, int]:
    """Places gained by each item that is in both lists, the gap that vanished items leave already closed.

    So an item that merely slides up because the one above was clicked has not moved.
    """
    kept = set(before) & set(after)
    was = {item: place for place, item in enumerate(item for item in before if item in kept)}
    return {item: was[item] - place for place, item in enumerate(item for item in after if item in kept)}


def stages(times_ms: Mapping[str, float], took_ms: float) -> list[Stage]:
    """Stage times -> the pieces of one bar, in the pipeline's order; what lies between and around them is `other`."""
    times = dict(times_ms)
    other = took_ms - sum(times.values())
    if other >= OTHER_MS:
        times["other"] = other
    total = sum(times.values()) or 1.0
    pieces, at = [], 0.0
    for name, ms in times.items():
        pieces.append(Stage(name, ms, at / total, ms / total))
        at += ms
    return pieces


def explain_degraded(reasons: Sequence[str]) -> list[tuple[str, str]]:
    """Reason -> (reason, what it means to the reader)."""
    return [
        (r, SCORED_ELSEWHERE if SCORED_BY in r else DEGRADED.get(r.split(":")[0].split(".")[0], _MISSING))
        for r in reasons
    ]


def ranking(
    user: str,
    answer: Mapping[str, Any],
    reasons: Mapping[str, Reason],
    cards: Mapping[str, Card],
    before: Sequence[tuple[str, float]] = (),
) -> Ranking:
    """The answer of `/v1/recommend`, its explanation and the titles -> what the page shows.

    `answer["stages"]` is in milliseconds. Scores are probabilities, so a bar is the score itself.
    """
    items = answer["items"]
    gained = moves([i for i, _ in before], [i["id"] for i in items])
    scores = dict(before)
    rows = []
    for place, item in enumerate(items, start=1):
        name, score = item["id"], float(item["score"])
        reason = reasons.get(name, Reason())
        rows.append(
            Row(
                key=key(name),
                card=cards.get(name) or Card(name, name),
                position=place,
                score=score,
                bar=min(1.0, max(0.0, score)),
                tasks=item.get("scores") or {},
                weights=weigh(reason.history, cards),
                sources=reason.sources,
                rules=reason.rules,
                delta=gained.get(name) if before else None,
                change=score - scores[name] if name in scores else None,
                new=bool(before) and name not in scores,
            )
        )
    width = max((len(row.weights) for row in rows), default=0)
    influence = [0.0] * width
    for row in rows:
        for place, weight in enumerate(row.weights):
            influence[place] += weight.share / len(rows)
    return Ranking(
        user=user,
        request_id=answer["request_id"],
        model=answer["model"]["name"],
        version=answer["model"]["version"],
        rows=rows,
        stages=stages(answer["stages"], float(answer["took_ms"])),
        took_ms=float(answer["took_ms"]),
        degraded=explain_degraded(answer["degraded"]),
        raw=json.dumps(answer, indent=2, ensure_ascii=False),
        influence=influence,
    )
