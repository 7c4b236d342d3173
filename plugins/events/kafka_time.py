"""Finds the first record at or after a time, though the broker's own answer may be wrong."""

from __future__ import annotations

from collections.abc import Callable

from engine.components import LogRecord
from engine.errors import EventError


def first_at(fetch: Callable[[int], LogRecord | None], begin: int, end: int, seconds: float, guess: int | None) -> int:
    """The offset of the first record that the log took at or after `seconds`; `end` where there is none.

    fetch(offset): the record there or the next one after it, None at the end. guess: the broker's answer, None for
    "none is"; it is taken where the records around it agree, else the times, which rise, are halved. EventError where
    records have no time.
    """

    def late(offset: int) -> bool:
        record = fetch(offset)
        if record is not None and record.seconds is None:
            raise EventError("the brokers keep no time of their records: begin at an offset, not at a time")
        return record is None or (record.seconds or 0.0) >= seconds

    place = end if guess is None else guess
    if begin <= place <= end and late(place) and (place == begin or not late(place - 1)):
        return place
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if late(middle):
            high = middle
        else:
            low = middle + 1
    return low
