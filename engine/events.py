"""Events: CloudEvents 1.0 in JSON, of four kinds, checked before they enter the log.

The kind is the last word of the envelope's `type`: `interaction`, `com.example.shop.interaction`. Two events with one
`source` and one `id` are one event.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.errors import EventError
from engine.hashing import canonical

INT64 = Meta(ge=-(2**63), le=2**63 - 1)
_TEXT = Meta(min_length=1, extra_json_schema={"maxLength": 256, "pattern": r"^[^\u0000-\u001f\u007f]+$"})
Id = Annotated[str, _TEXT] | Annotated[int, INT64]
"""An id as it is sent: text, or an integer that stands for its text."""
Scalar = None | bool | Annotated[int, INT64] | float | str
Value = None | bool | Annotated[int, INT64] | float | str | list[Scalar]
"""A feature's raw value; several for a multi-valued one."""
Features = dict[Annotated[str, Meta(max_length=64)], Value]

FUTURE_SECONDS = 24 * 3600
"""How far ahead of this machine's clock an event may say it happened."""


class Envelope(msgspec.Struct):
    """CloudEvents 1.0. Other attributes (extensions) are kept as they come."""

    id: Annotated[str, Meta(min_length=1, max_length=256, description="unique within its source")]
    source: Annotated[str, Meta(min_length=1, max_length=512, description="who sends: a URI or a name")]
    type: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=256,
            pattern=r"^([A-Za-z0-9_-]+\.)*(item|user|ranking|interaction)$",
            description="ends in item, user, ranking or interaction",
        ),
    ]
    data: dict[str, Any]
    specversion: Literal["1.0"] = "1.0"
    time: Annotated[datetime, Meta(tz=True, description="RFC 3339; when it happened; default: now")] | None = None


class InteractionData(msgspec.Struct):
    """Someone did something with an item."""

    type: Annotated[str, Meta(min_length=1, max_length=64, description="click, conversion, ...")]
    user: Id
    item: Id
    ranking: Annotated[str, Meta(max_length=256, description="request id of the ranking that showed it")] | None = None


class UserData(msgspec.Struct):
    """What is known of a user now: values replace, null removes."""

    user: Id
    features: Features


class ItemData(msgspec.Struct):
    """What is known of an item now."""

    item: Id
    features: Features


class RankedItem(msgspec.Struct):
    id: Id
    score: float | None = None
    position: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    propensity: Annotated[float, Meta(gt=0, le=1)] | None = None


class RankingData(msgspec.Struct):
    """What was shown, in order."""

    request_id: Annotated[str, Meta(min_length=1, max_length=256)]
    user: Id
    items: list[RankedItem]


Data = InteractionData | UserData | ItemData | RankingData
KINDS: dict[str, type[Data]] = {
    "interaction": InteractionData,
    "user": UserData,
    "item": ItemData,
    "ranking": RankingData,
}


@dataclass(frozen=True)
class Event:
    """A checked event. key: what its records are partitioned and erased by; seconds: since 1970; value: its bytes."""

    id: str
    source: str
    kind: str
    key: str
    seconds: int
    data: Data
    value: bytes


@dataclass(frozen=True)
class EventLimits:
    """id_bytes: longest id; depth: deepest JSON."""

    id_bytes: int = 256
    depth: int = 16


def check_id(value: str | int, limits: EventLimits, what: str = "id") -> str:
    """An id's canonical text; EventError for one that is too long or holds control characters."""
    text = canonical(value)
    if len(text) > limits.id_bytes or (not text.isascii() and len(text.encode()) > limits.id_bytes):
        raise EventError(f"{what} is longer than {limits.id_bytes} bytes")
    if not text.isprintable() and any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise EventError(f"{what} holds control characters")
    return text


def item_key(item: str) -> str:
    """The key of an item's events; no user has it, as ids hold no control characters."""
    return f"\x00item\x00{item}"


def decode_event(raw: bytes | msgspec.Raw, limits: EventLimits, now: float | None = None) -> Event:
    """One CloudEvent -> Event. EventError says what is wrong with it."""
    now = time.time() if now is None else now
    try:
        document = msgspec.json.decode(raw)
        envelope = msgspec.convert(document, Envelope)
        if too_deep(document, limits.depth):
            raise EventError(f"nested deeper than {limits.depth} levels")
        kind = envelope.type.rpartition(".")[2]
        data = msgspec.convert(envelope.data, KINDS[kind])
    except msgspec.ValidationError as error:
        raise EventError(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EventError(f"not JSON: {error}") from None
    except RecursionError:
        raise EventError(f"nested deeper than {limits.depth} levels") from None
    moment = datetime.fromtimestamp(now, UTC) if envelope.time is None else envelope.time
    seconds = int(moment.timestamp())
    if seconds < 0:
        raise EventError("time lies before 1970")
    if seconds > now + FUTURE_SECONDS:
        raise EventError("time lies more than a day ahead of this server's clock")
    document.setdefault("specversion", "1.0")
    if envelope.time is None:
        document["time"] = moment.isoformat().replace("+00:00", "Z")
    return Event(
        id=envelope.id,
        source=envelope.source,
        kind=kind,
        key=_key(data, limits),
        seconds=seconds,
        data=data,
        value=msgspec.json.encode(document),
    )


def _key(data: Data, limits: EventLimits) -> str:
    """Checks every id of the data; the user's, or for an item's event the item's."""
    if isinstance(data, ItemData):
        return item_key(check_id(data.item, limits, "data.item"))
    if isinstance(data, InteractionData):
        check_id(data.item, limits, "data.item")
    elif isinstance(data, RankingData):
        for number, item in enumerate(data.items):
            check_id(item.id, limits, f"data.items[{number}].id")
    return check_id(data.user, limits, "data.user")


def too_deep(value: object, depth: int) -> bool:
    """Whether lists and objects nest deeper than `depth`; no recursion."""
    level: list[object] = [value]
    for _ in range(depth):
        inner: list[object] = []
        for part in level:
            if isinstance(part, dict):
                inner.extend(part.values())
            elif isinstance(part, list):
                inner.extend(part)
        level = [part for part in inner if isinstance(part, dict | list)]
        if not level:
            return False
    return True


class Dedupe:
    """Knows the newest (source, id) pairs, so that an event sent twice counts once. Thread-safe.

    A twin waits for an event that is being written until its outcome is known: a failed one has no duplicates.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._pending: dict[tuple[str, str], Future[None]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def remember(self, pair: tuple[str, str]) -> None:
        """An event that is in the log already."""
        with self._lock:
            self._add(pair)

    def _add(self, pair: tuple[str, str]) -> None:
        self._seen[pair] = None
        self._seen.move_to_end(pair)
        while len(self._seen) > self.capacity:
            self._seen.popitem(last=False)

    def once(
        self, pairs: Sequence[tuple[str, str]], write: Callable[[list[int]], None], patience: float = 5.0
    ) -> list[bool]:
        """Calls `write` with the positions of the pairs that are new -> which were new; raises what `write` raises."""
        new: list[int] = []
        mine: dict[tuple[str, str], Future[None]] = {}
        others: list[Future[None]] = []
        with self._lock:
            for position, pair in enumerate(pairs):
                if pair in self._pending and pair not in mine:
                    others.append(self._pending[pair])
                elif pair not in self._seen and pair not in mine:
                    mine[pair] = self._pending[pair] = Future()
                    new.append(position)
        try:
            if new:
                write(new)
        except BaseException as error:
            self._settle(mine, error)
            raise
        self._settle(mine, None)
        for other in others:
            try:
                other.result(timeout=patience)
            except TimeoutError:
                raise EventError("the same event is being written by another request; send it again") from None
        fresh = set(new)
        return [position in fresh for position in range(len(pairs))]

    def _settle(self, mine: dict[tuple[str, str], Future[None]], error: BaseException | None) -> None:
        with self._lock:
            for pair in mine:
                if error is None:
                    self._add(pair)
                del self._pending[pair]
        for future in mine.values():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
