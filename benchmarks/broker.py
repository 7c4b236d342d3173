"""The Kafka-protocol broker of `serving.dev_broker` for a benchmark, and event logs on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.components import EventLog
from engine.config import ComponentConfig
from engine.errors import PlexrankError
from engine.plugins import Plugins
from engine.served import component
from serving.dev_broker import DevBroker


@contextmanager
def broker() -> Iterator[str]:
    """-> its address; it is ended by its process id."""
    try:
        own = DevBroker()
    except PlexrankError as error:
        sys.exit(f"this benchmark needs a broker: {error}")
    with own:
        yield own.address


def options(address: str, **more: Any) -> dict[str, Any]:
    """Of the event log `kafka` on it."""
    return {"bootstrap_servers": [address], **more}


def kafka(plugins: Plugins, address: str, **more: Any) -> EventLog:
    log: EventLog = component(plugins, "event_logs", ComponentConfig(name="kafka", options=options(address, **more)))
    return log
