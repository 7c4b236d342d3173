"""What every plugin is: a class with a name, options of its own and one line that says what it is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class PluginOptions(BaseModel):
    """Options of a component: unknown keys and wrong types are configuration errors with their line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Component:
    """What the registry holds: a class with a `name`, its options and one line that says what it is."""

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]
