"""The way of an event: checked, written to the log once, then into its user's state for the next ranking."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from engine.components import EventLog, LogRecord, StateStore
from engine.errors import EventError, PlexrankError
from engine.events import Dedupe, Event, EventLimits, InteractionData, ItemData, UserData, decode_event
from engine.hashing import canonical
from engine.plugins import Plugins
from engine.streaming.events.binary_mode import from_binary, is_binary
from engine.streaming.events.forward import WAITING, ForwardingLog

log = logging.getLogger("plexrank.events")

WAITS = "events: waiting in the local log"
"""What an answer is degraded by while the event log is away."""

_CHUNK = 5_000
_TAIL_BYTES = 64 << 20
"""Of a partition's tail that is read at a start: rankings are large, and there are many of them."""


class _Named(msgspec.Struct):
    id: str


class Receipt(msgspec.Struct, omit_defaults=True):
    """What became of one event. An accepted one without a position waits on this machine until the log is back."""

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
    """Takes events in. `positive`: interaction types that enter the history (all enter what was seen).

    `on_items`, where it is set, is called with durable events of items, in order, as users' events go to the store.
    """

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
        self.on_items: Callable[[Sequence[Event]], None] | None = None

    def recover(self, replayed: int = 5_000) -> int:
        """Reads the log's tail after a start: pairs to know again, and events that a crash kept from the state.

        Adding an interaction twice changes nothing, so all of the last `replayed` events are applied -> how many. A
        log that is away is left out; what waits for it on this machine is not.
        """
        applied = 0
        try:
            for partition, end in self.log.ends().items():
                applied += self._replay(self._tail(partition, end), replayed)
        except PlexrankError as error:
            log.warning("the end of the event log could not be replayed: %s", error)
        if isinstance(self.log, ForwardingLog):
            applied += self._replay(self.log.spool.records(), replayed)
        return applied

    def _tail(self, partition: int, end: int) -> list[LogRecord]:
        """The newest records of a partition, in order: as many as can be known again, of at most 64 MiB."""
        pieces: list[list[LogRecord]] = []
        size, oldest = 0, max(0, end - self.dedupe.capacity)
        while end > oldest and size < _TAIL_BYTES:
            start = max(oldest, end - _CHUNK)
            piece = [r for r in self.log.read({partition: start}, end - start) if r.offset < end]
            size += sum(len(record.value) for record in piece)
            pieces.append(piece)
            end = start
        return [record for piece in reversed(pieces) for record in piece]

    def _replay(self, records: Iterable[LogRecord], replayed: int) -> int:
        """Knows all of them, applies the last ones -> how many those are."""
        events: deque[Event] = deque(maxlen=replayed)
        unread = 0
        for record in records:
            if not record.value:
                continue
            try:
                value = from_binary(record, self.limits) if is_binary(record.headers) else record.value
                event = decode_event(value, self.limits, now=float("inf"))
            except EventError as error:
                log.debug("partition %d, offset %d is not replayed: %s", record.partition, record.offset, error)
                unread += 1
                continue
            self.dedupe.remember((event.source, event.id))
            events.append(event)
        if unread:
            log.warning("%d of the records that were replayed are no events of this server's kind", unread)
        self._apply(events)
        return len(events)

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
            for n, position in zip(new, positions, strict=True):
                place = (None, None) if position == WAITING else position
                receipts[places[n]] = Receipt(events[n].id, "accepted", *place)
            fresh = [events[n] for n in new]
            received.degraded = [WAITS] * (WAITING in positions) + self._apply(fresh)
            if self.plugins.listens("on_event"):
                for event in fresh:
                    self.plugins.notify("on_event", event=msgspec.json.decode(event.value))

        self.dedupe.once([(event.source, event.id) for event in events], write)
        return received

    def _apply(self, events: Sequence[Event]) -> list[str]:
        """Durable events into users' states, one write a user and sort; what failed."""
        interactions: dict[tuple[str, bool], list[Event]] = defaultdict(list)
        of_items: list[Event] = []
        degraded = []
        for event in events:
            if isinstance(event.data, InteractionData):
                interactions[(event.key, event.data.type in self.positive)].append(event)
            elif isinstance(event.data, UserData):
                try:
                    self.store.update(event.key, event.data.features)
                except Exception as error:
                    degraded.append(_failed("state", error))
            elif isinstance(event.data, ItemData):
                of_items.append(event)
        for (user, positive), group in interactions.items():
            items = [canonical(event.data.item) for event in group if isinstance(event.data, InteractionData)]
            try:
                self.store.append(user, items, [event.seconds for event in group], positive=positive)
            except Exception as error:
                degraded.append(_failed("state", error))
        if of_items and self.on_items is not None:
            try:
                self.on_items(of_items)
            except Exception as error:
                degraded.append(_failed("items", error))
        return sorted(set(degraded))


def _failed(part: str, error: Exception) -> str:
    log.warning("events are in the log but not in the %s: %s: %s", part, type(error).__name__, error)
    return f"{part}: {type(error).__name__}"


def _id_of(document: bytes | msgspec.Raw) -> str | None:
    """The id of an event that was refused, where it can be read."""

    try:
        return msgspec.json.decode(document, type=_Named).id[:256]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
