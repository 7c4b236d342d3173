"""What a task makes of an impression whose window is still open, when what it waits for may come much later."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from engine.components.base import Component, PluginOptions


class DelayedFeedback(Component, ABC):
    """When an impression goes out as a negative, and how the loss is corrected for those that become positive later.

    A positive always goes out when its interaction comes. Where `presumed_after` is a number, the impression has gone
    out as a negative besides: the stream then says b = p / (1 + p) where the truth is p, and the loss has to undo it.
    Whatever is learnt, an impression is judged once: as a positive when it becomes one, else at its window's end.
    """

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @property
    @abstractmethod
    def presumed_after(self) -> float | None:
        """Seconds >= 0 after its ranking at which every impression goes out as a negative, those that are positive by
        then included; 0: as soon as it is read. None: only at its window's end, and only where it is not positive."""

    @abstractmethod
    def logits(self, logits: Tensor) -> Tensor:
        """At which logits the loss is taken, where the model says `logits` [N]; increasing, with its gradient."""

    @abstractmethod
    def weight(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """What each row's loss counts for, float32 [N] >= 0 without gradient; None: all alike.

        logits [N], labels [N] of 0 and 1: what the model says of the row now, and what the stream does.
        """
