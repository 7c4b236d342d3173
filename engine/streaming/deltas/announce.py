"""Tells the stream `models` of a pointer, for servers that see the registry late or have only its versions."""

from __future__ import annotations

from engine.components import EventLog
from engine.streaming.deltas.pointer import Pointer
from engine.streaming.events.streams import STREAMS

MODELS = "models"


def announce(models: EventLog, pointer: Pointer) -> None:
    """Once more does no harm: followers take the newest. Errors as of `EventLog.append`."""
    models.append([(pointer.model, pointer.encoded())])


def tell(events: EventLog, pointer: Pointer) -> None:
    """As `announce`, beside the log of events; holds the stream for no longer than that, as a learner writes it too."""
    models = events.sibling(MODELS, **STREAMS[MODELS])
    try:
        announce(models, pointer)
    finally:
        models.close()
