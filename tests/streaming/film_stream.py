"""What visitors of the small film world do, as events: rankings, clicks, and whatever else may stand in a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from engine.components import EventLog

BEGIN = 1_700_100_000.0
"""Time of the first event, behind the last rating of the film world."""
SHOWN = 5


@dataclass
class Stream:
    """Events in the order of time, (key, bytes) each, and what must become of them.

    liked: (request, item) that were clicked in time.
    """

    events: list[tuple[str, bytes]] = field(default_factory=list)
    shown: list[tuple[str, str]] = field(default_factory=list)
    liked: set[tuple[str, str]] = field(default_factory=set)

    def write(self, log: EventLog, chunk: int = 500) -> None:
        for start in range(0, len(self.events), chunk):
            log.append(self.events[start : start + chunk])


def event(kind: str, name: str, seconds: float, data: dict[str, Any]) -> bytes:
    time = datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    return msgspec.json.encode(
        {"specversion": "1.0", "id": name, "source": "films", "type": kind, "time": time, "data": data}
    )


def ranking(request: str, user: str, items: Sequence[str], seconds: float, history: Sequence[str] = ()) -> bytes:
    data = {
        "request_id": request,
        "user": user,
        "items": [{"id": item} for item in items],
        "user_features": {"user_id": user},
        "history": list(history),
    }
    return event("ranking", request, seconds, data)


def click(name: str, user: str, item: str, request: str, seconds: float) -> bytes:
    return event("interaction", name, seconds, {"type": "click", "user": user, "item": item, "ranking": request})


def visits(count: int, *, seed: int = 5, gap: float = 1.0, taste: int = 0, begin: float = BEGIN) -> Stream:
    """`count` rankings of five films each, a second apart; films of a user's genre are clicked four times in five.

    taste: how far users' genres have moved since the world was made.
    """
    rng = np.random.default_rng(seed)
    stream, past = Stream(), {}
    later: list[tuple[float, str, bytes]] = []
    for number in range(count):
        moment, user = begin + gap * number, int(rng.integers(40))
        items = rng.choice(30, SHOWN, replace=False)
        request, name = f"r{seed}-{number}", f"u{user}"
        while later and later[0][0] <= moment:
            _, key, value = later.pop(0)
            stream.events.append((key, value))
        titles = [str(item) for item in items]
        stream.events.append((name, ranking(request, name, titles, moment, past.get(name, ()))))
        for item, title in zip(items, titles, strict=True):
            stream.shown.append((request, title))
            if rng.random() < (0.8 if item % 3 == (user + taste) % 3 else 0.15):
                stream.liked.add((request, title))
                past[name] = [title, *past.get(name, ())][:10]
                delay = 0.5 + 3 * rng.random()
                later.append((moment + delay, name, click(f"{request}-{title}", name, title, request, moment + delay)))
        later.sort(key=lambda e: e[:2])
    stream.events += [(key, value) for _, key, value in later]
    return stream
