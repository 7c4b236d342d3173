"""The log of a configuration and the streams beside it: made where they are missing, and how full they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.components import EventLog
from engine.config import ComponentConfig
from engine.errors import CheckpointError, EventError
from engine.plugins import Plugins
from engine.streaming.events.open_log import KIND, open_log
from engine.streaming.events.streams import STREAMS
from engine.streaming.learning.monitoring import checkpointed, group_of

log = logging.getLogger("plexrank.events")

EVENTS = "events"
_LEARNT = (EVENTS, "examples")
"""What learners read."""


@dataclass(frozen=True)
class Topic:
    """One partition. age: seconds since its newest record came; None where it is empty, or the log keeps no time.

    lag: records that the learner's newest checkpoint is behind; None where no learner is known to read it.
    """

    stream: str
    partition: int
    begin: int
    end: int
    age: float | None
    lag: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(
    plugins: Plugins,
    use: ComponentConfig,
    state_dir: Path,
    partitions: int | None = None,
    *,
    model: str | None = None,
    learner: Path | None = None,
) -> list[Topic]:
    """Every partition of every stream, after the missing ones were made.

    partitions: of the log, where it is made now. learner: the folder of a learner whose lag is asked for; without it,
    that of the learners of `model`, as far as the log keeps a copy of their positions. Errors as of `open_log`;
    CheckpointError for a folder without a checkpoint, or with one of another log.
    """
    identity, reached = (None, {}) if learner is None else checkpointed(learner)
    events = _opened(plugins, use, state_dir, partitions)
    try:
        found: list[Topic] = []
        known = False
        for name, how in {EVENTS: None, **STREAMS}.items():
            stream = events if how is None else events.sibling(name, **how)
            try:
                if identity is None:
                    at = stream.noted(group_of(model)) if model is not None and name in _LEARNT else {}
                else:
                    at = reached if stream.identity == identity else {}
                    known |= stream.identity == identity
                found += _partitions(name, stream, at)
            finally:
                if stream is not events:
                    stream.close()
        if identity is not None and not known:
            raise CheckpointError(f"{learner}: its positions are of another log ({identity}) than {events.identity}")
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


def _partitions(name: str, stream: EventLog, reached: Mapping[int, int]) -> Iterator[Topic]:
    begins = stream.begins()
    for partition, end in sorted(stream.ends().items()):
        begin = begins.get(partition, 0)
        newest = next(iter(stream.read({partition: end - 1}, 1)), None) if end > begin else None
        age = None if newest is None or newest.seconds is None else max(0.0, time.time() - newest.seconds)
        lag = max(0, end - max(begin, reached[partition])) if partition in reached else None
        yield Topic(name, partition, begin, end, age, lag)
