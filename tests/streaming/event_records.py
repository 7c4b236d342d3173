"""Events and records by hand, for the tests of decoding."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from engine.components import LogRecord
from engine.events import EventLimits
from engine.streaming.events.decode import Decoded, decode_records

LIMITS = EventLimits(id_bytes=256, depth=16)
NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC).timestamp()
FUTURE = 300.0


def click(**changes: Any) -> dict[str, Any]:
    whole = {
        "id": "e1",
        "source": "shop",
        "specversion": "1.0",
        "type": "interaction",
        "time": "2026-05-04T11:59:58.5Z",
        "data": {"type": "click", "user": "u1", "item": "i1", "ranking": "r1"},
    }
    return whole | changes


def ranking(**changes: Any) -> dict[str, Any]:
    data = {
        "request_id": "r1",
        "user": "u1",
        "items": [
            {"id": "i1", "score": 0.75, "position": 1, "propensity": 1.0},
            {"id": "i2", "score": -1.5, "position": 2, "propensity": 0.25},
        ],
        "model": "ads",
        "version": "3f2a+1.7",
        "arms": [{"experiment": "ranker", "arm": "b"}],
        "user_features": {"age": 33, "tags": ["a", None]},
        "context": {"hour": 12, "mobile": True},
        "history": ["i9", "i8"],
        "item_features": {"price": [9.5, None]},
        "shown": 50,
    }
    return click(id="r", type="ranking", data=data | changes)


def record(document: Any, offset: int = 0, **changes: Any) -> LogRecord:
    value = document if isinstance(document, bytes) else json.dumps(document).encode()
    return LogRecord(**{"partition": 0, "offset": offset, "key": "u1", "value": value, "seconds": NOW - 1} | changes)


def decoded(*documents: Any) -> Decoded:
    records = [d if isinstance(d, LogRecord) else record(d, n) for n, d in enumerate(documents)]
    return decode_records(records, LIMITS, NOW, FUTURE)


def reasons(got: Decoded) -> list[str]:
    return [str(dead.reason) for dead in got.dead]
