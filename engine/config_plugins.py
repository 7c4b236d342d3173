"""How a configuration names a plugin, and which one stands where it names none."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import Field

from engine.errors import PluginError
from engine.section import Section

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class ComponentConfig(Section):
    """A plugin by name, with the options of its own model (see `plexrank plugins`)."""

    name: str = Field(pattern=NAME, description="the plugin's name")
    options: dict[str, Any] = Field(default_factory=dict, description="the plugin's options")


@lru_cache(maxsize=1)
def default_names() -> dict[str, str]:
    """kind -> the plugin that stands where a configuration names none: entry-point group `plexrank.defaults`."""
    found: dict[str, str] = {}
    for point in entry_points(group="plexrank.defaults"):
        if found.setdefault(point.name, point.value) != point.value:
            raise PluginError(f"two defaults for {point.name}: '{found[point.name]}' and '{point.value}'")
    return found


def default_name(kind: str) -> str:
    """The default plugin of one kind; PluginError where no distribution declares one."""
    name = default_names().get(kind)
    if name is None:
        raise PluginError(f"no default for {kind}: name one in the configuration, or reinstall plexrank")
    return name


def component(kind: str) -> Any:
    """A field that names a plugin of this kind."""
    return Field(
        default_factory=lambda: ComponentConfig(name=default_name(kind)),
        description=f"a plugin of kind {kind}",
    )
