"""The way of an event: checked, written to the log once, then into its user's state for the next ranking."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from engine.components import EventLog, StateStore
from engine.errors import EventError
from engine.events import Dedupe, Event, EventLimits, InteractionData, UserData, decode_event
from engine.hashing import canonical
from engine.plugins import Plugins

log = logging.getLogger("plexrank.events")


class _Named(msgspec.Struct):
    id: str


class Receipt(msgspec.Struct, omit_defaults=True):
    """What became of one event."""

    id: str | None
    status: Literal["accepted", "duplicate", "refused"]
    partition: int | None = None
    offset: int | None = None
    error: str | None = None


@dataclass
class Received:
    """Receipts in the order of the events; degraded: parts that failed after the events were durable."""

    receipts: list[Receipt]
    degraded: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(receipt.status == status for receipt in self.receipts)


class Intake:
    """Takes events in. `positive`: interaction types that enter the history (all enter what was seen)."""

    def __init__(
        self,
        log_: EventLog,
        store: StateStore,
        plugins: Plugins,
        *,
        positive: Sequence[str],
        limits: EventLimits,
        remembered: int = 100_000,
    ) -> None:
        self.log, self.store, self.plugins = log_, store, plugins
        self.positive = frozenset(positive)
        self.limits = limits
        self.dedupe = Dedupe(remembered)

    def recover(self, replayed: int = 5_000) -> int:
        """Reads the log's tail after a start: pairs to know again, and events that a crash kept from the state.

        Adding an interaction twice changes nothing, so all of the last `replayed` events are applied -> how many.
        """
        applied = 0
        for partition, end in self.log.ends().items():
            events = []
            start = max(0, end - self.dedupe.capacity)
            for record in self.log.read({partition: start}, self.dedupe.capacity):
                try:
                    event = decode_event(record.value, self.limits, now=float("inf"))
                except EventError as error:
                    log.warning("partition %d, offset %d is not replayed: %s", partition, record.offset, error)
                    continue
                self.dedupe.remember((event.source, event.id))
                if record.offset >= end - replayed:
                    events.append(event)
            self._apply(events)
            applied += len(events)
        return applied

    def receive(self, documents: Sequence[bytes | msgspec.Raw]) -> Received:
        """Events as JSON. Refused ones are named in their receipt; EventError where the log cannot be written."""
        receipts: list[Receipt] = []
        events: list[Event] = []
        places: list[int] = []
        for place, document in enumerate(documents):
            try:
                event = decode_event(document, self.limits)
            except EventError as error:
                receipts.append(Receipt(_id_of(document), "refused", error=str(error)))
            else:
                receipts.append(Receipt(event.id, "duplicate"))
                events.append(event)
                places.append(place)
        received = Received(receipts)

        def write(new: list[int]) -> None:
            positions = self.log.append([(events[n].key, events[n].value) for n in new])
            for n, (partition, offset) in zip(new, positions, strict=True):
                receipts[places[n]] = Receipt(events[n].id, "accepted", partition, offset)
            fresh = [events[n] for n in new]
            received.degraded = self._apply(fresh)
            if self.plugins.listens("on_event"):
                for event in fresh:
                    self.plugins.notify("on_event", event=msgspec.json.decode(event.value))

        self.dedupe.once([(event.source, event.id) for event in events], write)
        return received

    def _apply(self, events: Sequence[Event]) -> list[str]:
        """Durable events into users' states, one write a user and sort; what failed."""
        interactions: dict[tuple[str, bool], list[Event]] = defaultdict(list)
        degraded = []
        for event in events:
            if isinstance(event.data, InteractionData):
                interactions[(event.key, event.data.type in self.positive)].append(event)
            elif isinstance(event.data, UserData):
                try:
                    self.store.update(event.key, event.data.features)
                except Exception as error:
                    degraded.append(_failed(error))
        for (user, positive), group in interactions.items():
            items = [canonical(event.data.item) for event in group if isinstance(event.data, InteractionData)]
            try:
                self.store.append(user, items, [event.seconds for event in group], positive=positive)
            except Exception as error:
                degraded.append(_failed(error))
        return sorted(set(degraded))


def _failed(error: Exception) -> str:
    log.warning("events are in the log but not in the state: %s: %s", type(error).__name__, error)
    return f"state: {type(error).__name__}"


def _id_of(document: bytes | msgspec.Raw) -> str | None:
    """The id of an event that was refused, where it can be read."""

    try:
        return msgspec.json.decode(document, type=_Named).id[:256]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
