"""Until the window's end."""

from __future__ import annotations

from torch import Tensor

from engine.components import DelayedFeedback
from engine.hookspecs import hookimpl


class Wait(DelayedFeedback):
    """Nothing is learnt of an impression that may still become positive; at its window's end it is a negative.

    No label is wrong, and none is younger than the window: right where that is minutes, as it is for clicks.
    """

    name = "wait"

    @property
    def presumed_after(self) -> None:
        return None

    def logits(self, logits: Tensor) -> Tensor:
        return logits

    def weight(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return None


@hookimpl
def delayed_feedback() -> list[type[DelayedFeedback]]:
    return [Wait]
