"""What the methods share that take each impression for a negative before its window has ended."""

from __future__ import annotations

from pydantic import Field

from engine.components import DelayedFeedback, PluginOptions


class Presuming(DelayedFeedback):
    """Says when; how the loss is corrected is a method's own."""

    class Options(PluginOptions):
        after_seconds: float = Field(0.0, ge=0, description="how long after its ranking an impression is a negative")

    options: Options

    @property
    def presumed_after(self) -> float:
        return self.options.after_seconds
