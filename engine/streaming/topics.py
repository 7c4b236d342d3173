"""The log of a configuration and the streams beside it: made where they are missing, and how full they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.components import EventLog
from engine.config import ComponentConfig
from engine.errors import EventError
from engine.plugins import Plugins
from engine.streaming.open_log import KIND, open_log

log = logging.getLogger("plexrank.events")

EVENTS = "events"
STREAMS: dict[str, dict[str, Any]] = {
    "dead": {},
    "examples": {},
    "deltas": {"partitions": 1},
    "models": {"partitions": 1, "compact": True},
}
"""Streams beside the log -> how they are made. Deltas follow one another, so they have one partition, and all of them
are needed; of the pointer to the served bundle only the newest is."""


@dataclass(frozen=True)
class Topic:
    """One partition. age: seconds since its newest record came; None where it is empty, or the log keeps no time."""

    stream: str
    partition: int
    begin: int
    end: int
    age: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(plugins: Plugins, use: ComponentConfig, state_dir: Path, partitions: int | None = None) -> list[Topic]:
    """Every partition of every stream, after the missing ones were made.

    partitions: of the log, where it is made now. Errors as of `open_log`.
    """
    events = _opened(plugins, use, state_dir, partitions)
    try:
        found = list(_partitions(EVENTS, events))
        for name, how in STREAMS.items():
            beside = events.sibling(name, **how)
            try:
                found += _partitions(name, beside)
            finally:
                beside.close()
        return found
    finally:
        events.close()


def _opened(plugins: Plugins, use: ComponentConfig, state_dir: Path, partitions: int | None) -> EventLog:
    """As a reader, beside whoever writes; where there is nothing to read yet, as the one who begins it."""
    options, known = dict(use.options), plugins.get(KIND, use.name).Options.model_fields
    if "read_only" in known:
        try:
            return open_log(plugins, use, state_dir, read_only=True)
        except EventError as error:
            log.debug("not there to read: %s", error)
    if partitions is not None and "partitions" in known:
        options["partitions"] = partitions
    return open_log(plugins, ComponentConfig(name=use.name, options=options), state_dir)


def _partitions(name: str, stream: EventLog) -> Iterator[Topic]:
    begins = stream.begins()
    for partition, end in sorted(stream.ends().items()):
        begin = begins.get(partition, 0)
        newest = next(iter(stream.read({partition: end - 1}, 1)), None) if end > begin else None
        age = None if newest is None or newest.seconds is None else max(0.0, time.time() - newest.seconds)
        yield Topic(name, partition, begin, end, age)
