"""Records of the log -> columns for the join, many at once; what cannot be read becomes a dead letter, never an error.

A record is one event in CloudEvents' structured or binary mode, or a batch of events. An empty one is a tombstone and
no event.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from engine.components import LogRecord
from engine.events import (
    KINDS,
    TYPE,
    Envelope,
    Event,
    EventLimits,
    EventRefused,
    InteractionData,
    RankingData,
    Reason,
    check_time,
    check_version,
    event_name,
    key_of,
    kind_of,
    open_event,
)
from engine.hashing import fingerprints
from engine.streaming.events.arrow_events import decode_batch, is_batch, row_of
from engine.streaming.events.arrow_rows import InteractionRows, RankingRows, interaction_rows, ranking_rows
from engine.streaming.events.binary_mode import from_binary, is_binary
from engine.streaming.events.dead import Dead
from engine.streaming.events.decoded import Decoded, Interactions, Rankings

__all__ = ["MOST_TYPES", "UNKNOWN_ITEM", "Decoded", "Interactions", "Rankings", "decode_records"]

UNKNOWN_ITEM = Reason.UNKNOWN_ITEM
"""For who knows what was shown: `Dead.of(records[interactions.record[n]], UNKNOWN_ITEM, ...)`."""
MOST_TYPES = 32_000
"""Names of interaction types in one `Decoded`; their codes are int16."""


class _Wire(Envelope, gc=False):
    """An envelope whose data is not read yet."""

    type: str
    data: msgspec.Raw  # type: ignore[assignment]


_WIRE = msgspec.json.Decoder(_Wire)
_DATA: dict[str, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(type_) for kind, type_ in KINDS.items()}


@dataclass(eq=False)
class _Opened:
    """Events of one kind as they were read, a list a column."""

    record: list[int] = field(default_factory=list)
    wire: list[Envelope] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def without(self, gone: set[int]) -> _Opened:
        keep = [n for n in range(len(self.record)) if n not in gone]
        return _Opened(
            [self.record[n] for n in keep],
            [self.wire[n] for n in keep],
            [self.data[n] for n in keep],
            [self.seconds[n] for n in keep],
        )


def decode_records(records: Sequence[LogRecord], limits: EventLimits, now: float, future_seconds: float) -> Decoded:
    """Events in the order of their records.

    An event lies in the future if it is more than `future_seconds` ahead of the time at which the log took it, so that
    reading it again finds the same; ahead of `now` where the log keeps no time, or says one that is still to come. An
    event without a time happened when the log took it.
    """
    return _Reading(records, limits, now, future_seconds).decoded()


class _Reading:
    def __init__(self, records: Sequence[LogRecord], limits: EventLimits, now: float, future_seconds: float) -> None:
        self.records, self.limits, self.now, self.future_seconds = records, limits, now, future_seconds
        self.opened = {kind: _Opened() for kind in KINDS}
        self.values: dict[int, bytes] = {}  # record -> structured form, of events in binary mode
        self.dead: list[tuple[int, Dead]] = []
        self.types: dict[str, int] = {}
        self.interactions: list[tuple[int, InteractionRows]] = []  # of batches
        self.rankings: list[tuple[int, RankingRows]] = []
        self.n = 0

    def decoded(self) -> Decoded:
        self._open()
        for kind in ("interaction", "ranking"):
            self._drop_untimely(kind)
            self._drop_ids(kind)
        items, users = self._whole("item"), self._whole("user")
        interactions, rankings = self._interactions(), self._rankings()
        times = [part.max() for part in (interactions.seconds, rankings.seconds) if len(part)]
        times += [max(seconds) for kind in ("item", "user") if (seconds := self.opened[kind].seconds)]
        return Decoded(
            n=self.n,
            rankings=rankings,
            interactions=interactions,
            items=items,
            users=users,
            dead=[dead for _, dead in sorted(self.dead, key=lambda pair: (pair[0], pair[1].row))],
            newest=float(max(times, default=math.nan)),
        )

    # ------------------------------------------------------------------------------------------ reading
    def _open(self) -> None:
        """Per record, as JSON comes that way; all that follows is by column."""
        depth = self.limits.depth
        for place, record in enumerate(self.records):
            value = record.value
            if not value:
                continue
            try:
                if is_batch(record):
                    self._batch(place, record)
                    continue
                self.n += 1
                if record.headers and is_binary(record.headers):
                    value = self.values[place] = from_binary(record, self.limits)
                try:
                    wire: Envelope = _WIRE.decode(value)
                    kind = _kind(wire.type)
                    data = _DATA[kind].decode(wire.data)  # type: ignore[arg-type]
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
                    _, wire, data = open_event(value, self.limits)  # says what is wrong
                    kind = kind_of(wire.type)
                if value.count(b"[") + value.count(b"{") > depth and _deeper(value, depth):
                    raise EventRefused(Reason.DEPTH, f"nested deeper than {depth} levels")
                if wire.dataschema is not None:
                    check_version(wire.dataschema)
            except EventRefused as refused:
                self._dies(place, refused)
                continue
            opened = self.opened[kind]
            opened.record.append(place)
            opened.wire.append(wire)
            opened.data.append(data)
            opened.seconds.append(self._taken(record) if wire.time is None else wire.time.timestamp())

    def _taken(self, record: LogRecord) -> float:
        """When the log took it."""
        return record.seconds if record.seconds is not None and 0 < record.seconds <= self.now else self.now

    def _latest(self, record: LogRecord) -> float:
        """The latest time that an event in this record may have."""
        return self._taken(record) + self.future_seconds

    def _batch(self, place: int, record: LogRecord) -> None:
        """A batch that cannot be read at all counts as one event."""
        try:
            rows, table = self._rows(record)
        except EventRefused:
            self.n += 1
            raise
        if isinstance(rows, RankingRows):
            self.rankings.append((place, rows))
        else:
            self.interactions.append((place, rows))
            for name in rows.types:
                self.types.setdefault(name, len(self.types))
        self.n += table.num_rows
        for bad in rows.bad:
            dead = Dead.of(record, bad.reason, bad.detail, bad.row, row_of(table, bad.row))
            self.dead.append((place, dead))

    def _rows(self, record: LogRecord) -> tuple[InteractionRows | RankingRows, pa.Table]:
        kind, table = decode_batch(record.value)
        check = ranking_rows if kind == "ranking" else interaction_rows
        try:
            rows: InteractionRows | RankingRows = check(table, self.limits, self._latest(record), self.future_seconds)
        except Exception as error:  # bytes that Arrow took for whole: one record must not stop the stream
            raise EventRefused(Reason.ARROW, f"rows that cannot be read: {error}") from None
        if isinstance(rows, InteractionRows) and len(self.types.keys() | set(rows.types)) > MOST_TYPES:
            raise EventRefused(Reason.ARROW, f"more than {MOST_TYPES:,} types of interactions at once")
        return rows, table

    # ------------------------------------------------------------------------------------------ checking
    def _drop_untimely(self, kind: str) -> None:
        opened = self.opened[kind]
        if not opened.record:
            return
        seconds = np.array(opened.seconds)
        latest = np.array([self._latest(self.records[place]) for place in opened.record])
        faults: dict[int, EventRefused] = {}
        for n in np.flatnonzero((seconds < 0) | (seconds > latest)).tolist():
            try:
                check_time(opened.seconds[n], latest[n] - self.future_seconds, self.future_seconds)
            except EventRefused as refused:
                faults[n] = refused
        self._bury(kind, faults)

    def _drop_ids(self, kind: str) -> None:
        """All ids at once; one by one only where one of them may be wrong."""
        opened = self.opened[kind]
        if kind == "interaction":
            ids = [d.user for d in opened.data] + [d.item for d in opened.data]
        else:
            ids = [d.user for d in opened.data]
            ids += [item.id for d in opened.data for item in d.items]
            ids += [item for d in opened.data if d.history for item in d.history]
        if _surely_good([id_ for id_ in ids if type(id_) is str], self.limits):
            return
        faults: dict[int, EventRefused] = {}
        for n, data in enumerate(opened.data):
            try:
                key_of(data, self.limits)
            except EventRefused as refused:
                faults[n] = refused
        self._bury(kind, faults)

    def _dies(self, place: int, refused: EventRefused) -> None:
        self.dead.append((place, Dead.of(self.records[place], refused.reason, str(refused))))

    def _bury(self, kind: str, faults: dict[int, EventRefused]) -> None:
        if not faults:
            return
        opened = self.opened[kind]
        for n, refused in faults.items():
            self._dies(opened.record[n], refused)
        self.opened[kind] = opened.without(set(faults))

    # ------------------------------------------------------------------------------------------ columns
    def _whole(self, kind: str) -> list[Event]:
        """Events of items and users: few, and wanted whole."""
        opened, events, faults = self.opened[kind], [], {}
        for n, (place, wire, data, seconds) in enumerate(
            zip(opened.record, opened.wire, opened.data, opened.seconds, strict=True)
        ):
            record = self.records[place]
            try:
                check_time(seconds, self._latest(record) - self.future_seconds, self.future_seconds)
                key = key_of(data, self.limits)
            except EventRefused as refused:
                faults[n] = refused
                continue
            value = self.values.get(place, record.value)
            events.append(Event(wire.id, wire.source, kind, key, int(seconds), data, value))
        self._bury(kind, faults)
        return events

    def _interactions(self) -> Interactions:
        opened = self.opened["interaction"]
        data: list[InteractionData] = opened.data
        code = [self.types.setdefault(d.type, len(self.types)) for d in data]
        if len(self.types) > MOST_TYPES:
            most = EventRefused(Reason.SCHEMA, f"more than {MOST_TYPES:,} types of interactions at once")
            self._bury("interaction", {n: most for n, number in enumerate(code) if number >= MOST_TYPES})
            self.types = {name: number for name, number in self.types.items() if number < MOST_TYPES}
            return self._interactions()
        named = np.array([bool(d.ranking) for d in data], bool)
        parts: list[tuple[np.ndarray, ...]] = [
            (
                _events(opened),
                np.where(named, fingerprints(d.ranking or "" for d in data), 0),
                fingerprints(d.item for d in data),
                np.array(code, np.int16),
                np.array(opened.seconds, np.float64),
                fingerprints(d.user for d in data),
                np.array(opened.record, np.int64),
            )
        ]
        for place, rows in self.interactions:
            codes = np.array([self.types[name] for name in rows.types], np.int16)
            parts.append(
                (
                    rows.event,
                    rows.request,
                    rows.item,
                    codes[rows.code] if len(codes) else np.empty(0, np.int16),
                    rows.seconds,
                    rows.user,
                    np.full(len(rows.event), place, np.int64),
                )
            )
        event, request, item, codes, seconds, user, record = _in_order(parts)
        return Interactions(event, request, item, list(self.types), codes, seconds, user, record)

    def _rankings(self) -> Rankings:
        opened = self.opened["ranking"]
        data: list[RankingData] = list(opened.data)
        parts: list[tuple[np.ndarray, ...]] = [
            (
                _events(opened),
                fingerprints(d.request_id for d in data),
                np.array(opened.seconds, np.float64),
                np.array(opened.record, np.int64),
                np.arange(len(data)),
            )
        ]
        for place, rows in self.rankings:
            many = len(rows.data)
            parts.append(
                (
                    rows.event,
                    rows.request,
                    rows.seconds,
                    np.full(many, place, np.int64),
                    np.arange(len(data), len(data) + many),
                )
            )
            data += rows.data
        event, request, seconds, record, order = _in_order(parts, by=3)
        return Rankings([data[n] for n in order.tolist()], event, request, seconds, record)


def _in_order(parts: list[tuple[np.ndarray, ...]], by: int = -1) -> tuple[np.ndarray, ...]:
    """Columns of several parts -> columns, by the record that each row came in."""
    if len(parts) == 1:
        return parts[0]
    columns = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(columns[by], kind="stable")
    return tuple(column[order] for column in columns)


def _events(opened: _Opened) -> np.ndarray:
    return fingerprints(event_name(wire.source, wire.id) for wire in opened.wire)


def _surely_good(ids: list[str], limits: EventLimits) -> bool:
    """Whether no id is too long or holds control characters; False also where that is not plain to see."""
    together = "".join(ids)
    most = max(map(len, ids), default=0)
    return together.isprintable() and most <= (limits.id_bytes if together.isascii() else limits.id_bytes // 4)


_KIND = re.compile(TYPE)


@lru_cache(maxsize=4096)
def _kind(type_: str) -> str:
    """The kind, '' where there is none such."""
    return kind_of(type_) if _KIND.fullmatch(type_) else ""


_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = bytes.maketrans(b"[]{}", b"()()")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))


def _deeper(value: bytes, depth: int) -> bool:
    """Whether JSON nests deeper than `depth`: all that is innermost is taken away that often, and something is left."""
    outside = _STRINGS.sub(b"", value) if b"\\" in value else b"".join(value.split(b'"')[::2])
    brackets = outside.translate(_BRACKETS, _OTHERS)
    for _ in range(depth):
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)
