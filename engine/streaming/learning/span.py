"""From where to where a log is learnt: words, offsets or times, as people say them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.components import EventLog
from engine.errors import EventError
from engine.streaming.events.positions import from_places, from_time, moment


@dataclass(frozen=True)
class Places:
    """An offset a partition."""

    offsets: tuple[str, ...]  # each partition:offset


@dataclass(frozen=True)
class Moment:
    """When the log took a record: seconds since 1970."""

    seconds: float


Start = Literal["earliest", "latest", "bundle", "checkpoint"] | Places | Moment
Until = Literal["live", "end"] | Places | Moment

_MILLISECONDS = re.compile(r"\d{9,15}")
_PLACES = re.compile(r"\d+:\d+(,\d+:\d+)*")


def start_of(text: str) -> Start:
    """`earliest`, `latest`, `bundle`, `checkpoint`, `0:1200,1:900` or a time. EventError for what is none."""
    match text:
        case "earliest" | "latest" | "bundle" | "checkpoint":
            return text
        case _:
            return _place_or_moment(text, "earliest, latest, bundle, checkpoint")


def until_of(text: str) -> Until:
    """`live`, `end`, `0:1200,1:900` or a time. EventError for what is none, or for a time that is still to come."""
    match text:
        case "live" | "end":
            return text
    found = _place_or_moment(text, "live, end")
    if isinstance(found, Moment) and found.seconds > time.time():
        raise EventError(f"'{text}' is still to come: learn up to 'end', or 'live'")
    return found


def _place_or_moment(text: str, words: str) -> Places | Moment:
    if _PLACES.fullmatch(text):
        return Places(tuple(text.split(",")))
    if _MILLISECONDS.fullmatch(text):
        return Moment(int(text) / 1000)
    try:
        return Moment(moment(text))
    except EventError:
        raise EventError(
            f"'{text}' is none of {words}, no offsets (0:1200,1:900), and no time (2026-01-31T12:00:00Z, or "
            "milliseconds since 1970)"
        ) from None


def located(log: EventLog, where: Places | Moment, partitions: Sequence[int]) -> dict[int, int]:
    """partition -> offset. EventError for offsets that the log does not hold, or for a partition that is not named."""
    if isinstance(where, Moment):
        found = from_time(log, where.seconds)
        return {p: found[p] for p in partitions}
    found = from_places(log, where.offsets)
    missing = sorted(set(partitions) - set(found))
    if missing:
        raise EventError(f"{','.join(where.offsets)}: says no offset of partition {', '.join(map(str, missing))}")
    return {p: found[p] for p in partitions}


def ends_of(log: EventLog, until: Until, positions: Mapping[int, int]) -> dict[int, int] | None:
    """Where each partition ends for this run, not before where it stands; None: nowhere."""
    match until:
        case "live":
            return None
        case "end":
            ends = log.ends()
        case _:
            ends = located(log, until, sorted(positions))
    return {p: max(ends[p], at) for p, at in positions.items()}
