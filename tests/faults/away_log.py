"""Plugin `event_logs.away`: a log in memory that tests can take away and bring back."""

from __future__ import annotations

from typing import Any

from engine.components import EventLog, PluginOptions
from engine.hookspecs import hookimpl
from tests.streaming.memory_log import MemoryLog


class AwayLog(MemoryLog):
    """One log a process, until `begin` makes another; opening it fails while it is away."""

    name = "away"
    first: Any = None

    def __init__(self, options: PluginOptions) -> None:
        super().__init__(options, partitions=2, world=None if AwayLog.first is None else AwayLog.first.world)
        if AwayLog.first is None:
            AwayLog.first = self
        self.health()

    @classmethod
    def begin(cls) -> AwayLog:
        cls.first = None
        return cls(PluginOptions())


@hookimpl
def event_logs() -> list[type[EventLog]]:
    return [AwayLog]
