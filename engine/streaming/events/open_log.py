"""Opens the log that a configuration names: to write as a server does, or to read beside one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.components import EventLog
from engine.config import ComponentConfig
from engine.plugins import Plugins
from engine.served import component

KIND = "event_logs"


def placed(plugins: Plugins, kind: str, use: ComponentConfig, folder: Path) -> ComponentConfig:
    """An option `path`, where the plugin has one, made relative to the state directory."""
    field = plugins.get(kind, use.name).Options.model_fields.get("path")
    if field is None:
        return use
    path = folder / str(use.options.get("path", field.default))
    return ComponentConfig(name=use.name, options={**use.options, "path": str(path)})


def open_log(plugins: Plugins, use: ComponentConfig, state_dir: Path, *, read_only: bool = False) -> EventLog:
    """The log, to be closed by the caller.

    read_only: sets the option of that name, where the plugin has one: another process may be writing. Raises
    PluginError for options that are wrong, LogUnavailable where the log does not answer, EventError for what it says.
    """
    use = placed(plugins, KIND, use, state_dir)
    options: dict[str, Any] = dict(use.options)
    if read_only and "read_only" in plugins.get(KIND, use.name).Options.model_fields:
        options["read_only"] = True
    log: EventLog = component(plugins, KIND, ComponentConfig(name=use.name, options=options))
    return log
