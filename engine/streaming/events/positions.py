"""Where in a log to begin, as people say it: `0:1200`, a time, the last n, the beginning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from engine.components import Capability, EventLog
from engine.errors import EventError


def place(text: str) -> tuple[int, int]:
    """`partition:offset`; EventError for what is none."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,18})", text)
    if found is None:
        raise EventError(f"'{text}' is no position: say partition:offset, as in 0:1200")
    return int(found[1]), int(found[2])


def moment(text: str) -> float:
    """A time in ISO 8601, UTC where it names no zone -> seconds since 1970."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise EventError(f"'{text}' is no time: say it as in 2026-01-31T12:00:00Z") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def from_places(log: EventLog, places: Sequence[str]) -> dict[int, int]:
    """These partitions from these offsets. EventError for one that the log does not hold."""
    begins, ends = log.begins(), log.ends()
    found = dict(map(place, places))
    for partition, offset in found.items():
        if partition not in ends:
            raise EventError(f"there is no partition {partition}; the log has {', '.join(map(str, sorted(ends)))}")
        if not begins[partition] <= offset <= ends[partition]:
            raise EventError(
                f"{partition}:{offset} is not in the log: it holds {begins[partition]} up to {ends[partition]}"
            )
    return found


def from_time(log: EventLog, seconds: float) -> dict[int, int]:
    """The first offset that the log took at or after a time, a partition."""
    if Capability.SEEK_TIME not in log.capabilities:
        raise EventError("this log does not find positions by time; say an offset, or the beginning")
    return log.position_at(seconds)


def last(log: EventLog, count: int) -> dict[int, int]:
    """So far from the ends that `count` records of each partition follow, as far as there are as many."""
    begins = log.begins()
    return {partition: max(begins.get(partition, 0), end - count) for partition, end in log.ends().items()}
