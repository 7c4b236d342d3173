"""What a learner reads: raw events that it joins, or examples that another learner joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.bundle import Bundle
from engine.config import Config
from engine.streaming.events.dead import DeadLetters
from engine.streaming.join.feedback import feedback_of, presumed_after
from engine.streaming.learning.examples_read import ExamplesRead
from engine.streaming.learning.joining import EventsJoined

if TYPE_CHECKING:
    from engine.plugins import Plugins


def joined(
    config: Config, bundle: Bundle, dead: DeadLetters, plugins: Plugins, stopped: Callable[[], bool]
) -> EventsJoined | ExamplesRead:
    """What turns the configured stream into examples."""
    if config.learning.source == "examples":
        return ExamplesRead(config, bundle, dead, stopped=stopped)
    presumed = presumed_after(feedback_of(config.learning.join, bundle.schema.tasks, plugins))
    return EventsJoined(config, bundle, dead, stopped=stopped, presumed=presumed)
