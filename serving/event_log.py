"""Opens the log that a server writes to; one that can be away gets a spool on this machine before it."""

from __future__ import annotations

from pathlib import Path

from engine.components import EventLog, LogRecord
from engine.config import ComponentConfig, ServingConfig, default_name
from engine.plugins import Plugins
from engine.served import component
from engine.streaming.forward import ForwardingLog
from engine.streaming.spool import Spool

SPOOL, REFUSED = "waiting", "refused"
"""Folders of the state directory: events on their way to the log, and those that it will never take."""

KIND = "event_logs"


def placed(plugins: Plugins, kind: str, use: ComponentConfig, folder: Path) -> ComponentConfig:
    """An option `path` made relative to the state directory."""
    field = plugins.get(kind, use.name).Options.model_fields.get("path")
    if field is None:
        return use
    path = folder / str(use.options.get("path", field.default))
    return ComponentConfig(name=use.name, options={**use.options, "path": str(path)})


def open_log(plugins: Plugins, config: ServingConfig, state_dir: Path, **defaults: object) -> EventLog:
    """The configured log as it is. LogUnavailable where it does not answer. defaults: options it may have left out."""
    use = placed(plugins, KIND, config.event_log, state_dir)
    log: EventLog = component(plugins, KIND, use, **defaults)
    return log


def open_forwarding(plugins: Plugins, config: ServingConfig, state_dir: Path) -> EventLog:
    """The configured log; any but the default kind may be away, and events then wait in one of the default kind."""
    if config.event_log.name == default_name(KIND):
        return open_log(plugins, config, state_dir)

    def local(folder: Path) -> EventLog:
        use = ComponentConfig(name=default_name(KIND), options={"path": str(folder)})
        log: EventLog = component(plugins, KIND, use)
        return log

    def aside(records: list[LogRecord], why: str) -> None:
        log = local(state_dir / REFUSED)
        try:
            notes = [(*record.headers, ("plexrank_refused", why.encode())) for record in records]
            log.append([(record.key, record.value) for record in records], notes)
        finally:
            log.close()

    return ForwardingLog(
        lambda: open_log(plugins, config, state_dir),
        Spool(state_dir / SPOOL, local, config.forward_bytes),
        aside,
    )
