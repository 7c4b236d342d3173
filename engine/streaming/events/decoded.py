"""Events as the join takes them: columns of fingerprints and times, in the order of the records they came in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.events import Event, RankingData
from engine.streaming.events.dead import Dead


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Rankings:
    """r rankings: data [r]; event, request int64 [r], fingerprints of (source, id) and of the request id; seconds
    float64 [r], since 1970; record int64 [r], which of the records each came in."""

    data: list[RankingData]
    event: np.ndarray
    request: np.ndarray
    seconds: np.ndarray
    record: np.ndarray = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, eq=False)
class Interactions:
    """k interactions: event, request, item, user int64 [k], fingerprints (request 0 where it names no ranking); type:
    names of types, code int16 [k] among them; seconds float64 [k]; record int64 [k], as in `Rankings`."""

    event: np.ndarray
    request: np.ndarray
    item: np.ndarray
    type: list[str]
    code: np.ndarray
    seconds: np.ndarray
    user: np.ndarray
    record: np.ndarray = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.event)


@dataclass(frozen=True, eq=False)
class Decoded:
    """n events, each in exactly one of the five. newest: time of the newest good one, nan where there is none."""

    n: int
    rankings: Rankings
    interactions: Interactions
    items: list[Event]
    users: list[Event]
    dead: list[Dead]
    newest: float
