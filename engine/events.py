"""Events: CloudEvents 1.0 in JSON, of four kinds, checked before they enter the log.

The kind is the last word of the envelope's `type`: `interaction`, `com.example.shop.interaction`. Two events with one
`source` and one `id` are one event. Kinds grow by optional fields only: an older reader ignores what it does not know,
and a `dataschema` that ends in a version above `VERSION` is refused rather than misread.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
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

VERSION = 1
"""Version of the kinds' data that this reader knows; it grows only where a field is removed or changes its meaning."""


class Reason(StrEnum):
    """Why an event is dead: a class for counting, beside a text for reading."""

    JSON = "json"  # not JSON
    NAN = "nan"  # a number that is not finite
    SCHEMA = "schema"  # JSON, but no event of ours
    VERSION = "version"  # of a newer major version
    DEPTH = "depth"  # nested too deep
    ID = "id"  # an id that is too long or holds control characters
    PAST = "past"  # before 1970
    FUTURE = "future"  # too far ahead of the clock
    ARROW = "arrow"  # a batch that cannot be read
    UNKNOWN_ITEM = "unknown_item"  # an interaction with an item that its ranking did not show


class EventRefused(EventError):
    """An event that will never be good. `reason` is its class."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


TYPE = r"^([A-Za-z0-9_-]+\.)*(item|user|ranking|interaction)$"
"""What an envelope's `type` looks like."""


class Envelope(msgspec.Struct, gc=False):
    """CloudEvents 1.0. Other attributes (extensions) are kept as they come."""

    id: Annotated[str, Meta(min_length=1, max_length=256, description="unique within its source")]
    source: Annotated[str, Meta(min_length=1, max_length=512, description="who sends: a URI or a name")]
    type: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=256,
            pattern=TYPE,
            description="ends in item, user, ranking or interaction",
        ),
    ]
    data: dict[str, Any]
    specversion: Literal["1.0"] = "1.0"
    time: Annotated[datetime, Meta(tz=True, description="RFC 3339; when it happened; default: now")] | None = None
    dataschema: (
        Annotated[str, Meta(max_length=1024, description="URI of the data's schema; ends in its version, as in /v1")]
        | None
    ) = None


class InteractionData(msgspec.Struct, omit_defaults=True, gc=False):
    """Someone did something with an item."""

    type: Annotated[str, Meta(min_length=1, max_length=64, description="click, conversion, ...")]
    user: Id
    item: Id
    ranking: Annotated[str, Meta(max_length=256, description="request id of the ranking that showed it")] | None = None
    value: Annotated[float, Meta(description="what it was worth: a price, a rating, seconds")] | None = None
    position: Annotated[int, Meta(ge=1, le=1_000_000, description="where the item stood; 1 is the top")] | None = None


class UserData(msgspec.Struct):
    """What is known of a user now: values replace, null removes."""

    user: Id
    features: Features


class ItemData(msgspec.Struct):
    """What is known of an item now."""

    item: Id
    features: Features


class RankedItem(msgspec.Struct, omit_defaults=True, gc=False):
    """One item that was shown."""

    id: Id
    score: Annotated[float, Meta(description="the model's, as ranked by")] | None = None
    position: Annotated[int, Meta(ge=1, le=1_000_000, description="1 is the top; default: its place")] | None = None
    propensity: Annotated[float, Meta(gt=0, le=1, description="chance that it was shown there")] | None = None


class Arm(msgspec.Struct, gc=False):
    """Which arm of an experiment answered."""

    experiment: Annotated[str, Meta(min_length=1, max_length=64)]
    arm: Annotated[str, Meta(min_length=1, max_length=64)]


class RankingData(msgspec.Struct, omit_defaults=True, gc=False):
    """What was shown, in order, and the feature values that it was scored with."""

    request_id: Annotated[str, Meta(min_length=1, max_length=256)]
    user: Id
    items: list[RankedItem]
    model: Annotated[str, Meta(max_length=64, description="the bundle's name")] | None = None
    version: Annotated[str, Meta(max_length=256, description="of the model, deltas included")] | None = None
    arms: list[Arm] = []
    user_features: Features | None = None
    context: Features | None = None
    history: Annotated[list[Id], Meta(description="the user's items, newest first")] | None = None
    item_features: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], list[Value]],
            Meta(description="feature -> a value an item, in order; null: the catalogue's"),
        ]
        | None
    ) = None
    shown: Annotated[int, Meta(ge=0, description="items of the whole answer, where `items` is cut")] | None = None

    def __post_init__(self) -> None:
        for name, values in (self.item_features or {}).items():
            if len(values) != len(self.items):
                raise ValueError(f"item_features.{name} has {len(values)} values for {len(self.items)} items")


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
    """An id's canonical text; EventRefused for one that is too long or holds control characters."""
    text = canonical(value)
    if len(text) > limits.id_bytes or (not text.isascii() and len(text.encode()) > limits.id_bytes):
        raise EventRefused(Reason.ID, f"{what} is longer than {limits.id_bytes} bytes")
    if not text.isprintable() and any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise EventRefused(Reason.ID, f"{what} holds control characters")
    return text


def item_key(item: str) -> str:
    """The key of an item's events; no user has it, as ids hold no control characters."""
    return f"\x00item\x00{item}"


def decode_event(
    raw: bytes | msgspec.Raw, limits: EventLimits, now: float | None = None, future_seconds: float = FUTURE_SECONDS
) -> Event:
    """One CloudEvent -> Event. EventRefused says what is wrong with it."""
    now = time.time() if now is None else now
    document, envelope, data = open_event(raw, limits)
    moment = datetime.fromtimestamp(now, UTC) if envelope.time is None else envelope.time
    seconds = check_time(moment.timestamp(), now, future_seconds)
    document.setdefault("specversion", "1.0")
    if envelope.time is None:
        document["time"] = moment.isoformat().replace("+00:00", "Z")
    return Event(
        id=envelope.id,
        source=envelope.source,
        kind=kind_of(envelope.type),
        key=key_of(data, limits),
        seconds=int(seconds),
        data=data,
        value=msgspec.json.encode(document),
    )


def open_event(raw: bytes | msgspec.Raw, limits: EventLimits) -> tuple[dict[str, Any], Envelope, Data]:
    """(the document, its envelope, its data): all that can be checked without a clock, but for the ids."""
    try:
        document = msgspec.json.decode(raw)
        envelope = msgspec.convert(document, Envelope)
        if too_deep(document, limits.depth):
            raise EventRefused(Reason.DEPTH, f"nested deeper than {limits.depth} levels")
        check_version(envelope.dataschema)
        kind = kind_of(envelope.type)
        if kind not in KINDS:  # `$` lets a line feed pass
            raise EventRefused(Reason.SCHEMA, "Expected no line feed - at `$.type`")
        return document, envelope, msgspec.convert(envelope.data, KINDS[kind])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(error, raw, limits) from None


def refusal(error: Exception, raw: bytes | msgspec.Raw, limits: EventLimits) -> EventRefused:
    """What msgspec says of these bytes, as ours."""
    if isinstance(error, RecursionError):
        return EventRefused(Reason.DEPTH, f"nested deeper than {limits.depth} levels")
    if isinstance(error, msgspec.ValidationError):
        infinite = str(error).startswith("Number out of range")
        return EventRefused(Reason.NAN if infinite else Reason.SCHEMA, str(error))
    return EventRefused(Reason.NAN if _holds_nan(raw) else Reason.JSON, f"not JSON: {error}")


def kind_of(type_: str) -> str:
    """`com.example.interaction` -> `interaction`."""
    return type_.rpartition(".")[2]


def event_name(source: str, id_: str) -> str:
    """One text for a (source, id), no two pairs have the same: its fingerprint is the event's."""
    return f"{len(source)}:{source}{id_}"


_VERSION = re.compile(r"[/:]v(\d{1,9})$")


def check_version(dataschema: str | None) -> None:
    """EventRefused where `dataschema` ends in a version that this reader does not know."""
    found = _VERSION.search(dataschema) if dataschema else None
    if found and int(found[1]) > VERSION:
        raise EventRefused(
            Reason.VERSION,
            f"dataschema says version {found[1]} and this version of plexrank reads up to {VERSION}; "
            "upgrade it, then resubmit the event",
        )


def check_time(seconds: float, now: float, future_seconds: float) -> float:
    """The time itself; EventRefused where it cannot be when something happened."""
    if seconds < 0:
        raise EventRefused(Reason.PAST, "time lies before 1970")
    if seconds > now + future_seconds:
        most = "a day" if future_seconds == FUTURE_SECONDS else f"{future_seconds:g} s"
        raise EventRefused(Reason.FUTURE, f"time lies more than {most} ahead of this server's clock")
    return seconds


def _holds_nan(raw: bytes | msgspec.Raw) -> bool:
    """Whether it would be JSON, were it not for NaN or Infinity."""
    text = bytes(raw)
    names: list[str] = []
    if b"NaN" not in text and b"Infinity" not in text:
        return False
    try:
        json.loads(text, parse_constant=names.append)
    except (ValueError, RecursionError):
        return False
    return bool(names)


def key_of(data: Data, limits: EventLimits) -> str:
    """Checks every id of the data; the user's, or for an item's event the item's."""
    if isinstance(data, ItemData):
        return item_key(check_id(data.item, limits, "data.item"))
    if isinstance(data, InteractionData):
        check_id(data.item, limits, "data.item")
    elif isinstance(data, RankingData):
        for number, shown in enumerate(data.items):
            check_id(shown.id, limits, f"data.items[{number}].id")
        for number, item in enumerate(data.history or ()):
            check_id(item, limits, f"data.history[{number}]")
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
