"""Opens the log that a server writes to; one that can be away gets a spool on this machine before it."""

from __future__ import annotations

from pathlib import Path

from engine.components import EventLog, LogRecord
from engine.config import ComponentConfig, ServingConfig, default_name
from engine.plugins import Plugins
from engine.streaming.events.forward import ForwardingLog
from engine.streaming.events.open_log import KIND, open_log
from engine.streaming.events.spool import Spool

SPOOL, REFUSED = "waiting", "refused"
"""Folders of the state directory: events on their way to the log, and those that it will never take."""


def open_forwarding(plugins: Plugins, config: ServingConfig, state_dir: Path) -> EventLog:
    """The configured log; any but the default kind may be away, and events then wait in one of the default kind."""
    if config.event_log.name == default_name(KIND):
        return open_log(plugins, config.event_log, state_dir)

    def local(folder: Path) -> EventLog:
        use = ComponentConfig(name=default_name(KIND), options={"path": str(folder.absolute())})
        return open_log(plugins, use, state_dir)

    def aside(records: list[LogRecord], why: str) -> None:
        log = local(state_dir / REFUSED)
        try:
            notes = [(*record.headers, ("plexrank_refused", why.encode())) for record in records]
            log.append([(record.key, record.value) for record in records], notes)
        finally:
            log.close()

    return ForwardingLog(
        lambda: open_log(plugins, config.event_log, state_dir),
        Spool(state_dir / SPOOL, local, config.forward_bytes),
        aside,
    )
