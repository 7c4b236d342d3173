"""Dead letters: events that will never be good as they are, kept with reason, position and original bytes.

They stand in the stream `dead` beside the log that they were read from, as JSON; the key is the event's own, so erasing
a user erases these too. A letter is written once, however often its event is read again after a crash.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import msgspec

from engine.components import EventLog, LogRecord
from engine.errors import EventError, LogUnavailable
from engine.events import Reason
from engine.streaming.events.binary_mode import Headers

log = logging.getLogger("plexrank.learning")

MOST_BYTES = 600_000
"""Value and headers that are longer are not copied: base64 would pass the 1 MiB that brokers take. They are read from
their own log again."""
_MOST_KEY = 1_024
"""Bytes of a key, beyond which it is cut, as no id is so long."""
_CHUNK = 500
_PAUSE = 0.5  # seconds between two attempts


@dataclass(frozen=True)
class Dead:
    """An event that is refused. key, value, headers: the record's own; of a batch, `row` and a batch of that row."""

    partition: int
    offset: int
    reason: Reason
    detail: str
    key: str
    value: bytes
    headers: Headers = ()
    row: int = -1

    @classmethod
    def of(cls, record: LogRecord, reason: Reason, detail: str, row: int = -1, value: bytes | None = None) -> Self:
        return cls(
            record.partition,
            record.offset,
            reason,
            detail[:500],
            record.key,
            record.value if value is None else value,
            record.headers,
            row,
        )


class _Record(msgspec.Struct, omit_defaults=True):
    """As it is stored. value and headers are absent where they were longer than MOST_BYTES, or the key was cut; size
    and sha256 are of the value."""

    reason: str
    detail: str
    stream: str
    partition: int
    offset: int
    key: str
    size: int
    sha256: str
    first_seen: float
    headers: list[tuple[str, bytes]] = []
    value: bytes | None = None
    row: int = -1


class _Marker(msgspec.Struct):
    """Says that the letter at this place of the dead log was resubmitted."""

    resubmitted: Annotated[tuple[int, int], msgspec.Meta(description="partition, offset")]
    at: float


@dataclass(frozen=True)
class Letter:
    """A dead letter. place: (partition, offset) in the dead log; first_seen: seconds since 1970; value None: too long
    to be copied, it still stands at its own position of `stream`."""

    place: tuple[int, int]
    reason: str
    detail: str
    stream: str
    partition: int
    offset: int
    row: int
    key: str
    value: bytes | None
    headers: Headers
    size: int
    sha256: str
    first_seen: float
    resubmitted: bool


_RECORD = msgspec.json.Decoder(_Record)
_MARKER = msgspec.json.Decoder(_Marker)
_Position = tuple[str, int, int, int]


class DeadLetters:
    """The dead letters of a log. One thread writes.

    log: the stream that the events are read from; its sibling `dead` is opened, and closed by `close`.
    remembered: positions known to have been written; the first `write` reads them from the dead log's tail.
    """

    def __init__(self, log: EventLog, remembered: int = 100_000, clock: Callable[[], float] = time.time) -> None:
        self.log, self.dead = log, log.sibling("dead")
        self._remembered, self._clock = remembered, clock
        self._written: OrderedDict[_Position, None] = OrderedDict()
        self._stale = True

    def bury(self, letters: Sequence[Dead], stopped: Callable[[], bool]) -> None:
        """`write`, again and again while the log does not answer; LogUnavailable where it is stopped meanwhile."""
        while letters:
            try:
                self.write(letters)
                return
            except LogUnavailable as error:
                log.warning("dead letters wait: %s", error)
                if stopped():
                    raise
                time.sleep(_PAUSE)

    def write(self, letters: Sequence[Dead]) -> int:
        """Those that are not there yet, durable on return -> how many. LogUnavailable: call again with the same."""
        if self._stale:
            self._recover()
        stream, now = self.log.identity, self._clock()
        fresh: dict[_Position, tuple[str, bytes]] = {}
        for letter in letters:
            position = (stream, letter.partition, letter.offset, letter.row)
            if position not in self._written and position not in fresh:
                fresh[position] = (_short(letter.key), _stored(letter, stream, now))
        records = list(fresh.values())
        for start in range(0, len(records), _CHUNK):
            try:
                self.dead.append(records[start : start + _CHUNK])
            except LogUnavailable:
                self._stale = True  # some may have been written
                raise
        for position in fresh:
            self._remember(position)
        return len(fresh)

    def list(self, limit: int = 100, reason: str | None = None) -> list[Letter]:
        """The newest `limit` letters, the oldest of them first; reason: only those of it."""
        marked: set[tuple[int, int]] = set()
        wanted = (pair for pair in self._scan(marked) if reason is None or pair[1].reason == reason)
        newest = heapq.nlargest(limit, wanted, key=lambda pair: (pair[1].first_seen, pair[0].partition, pair[0].offset))
        return [_letter(record, letter, marked) for record, letter in reversed(newest)]

    def resubmit(
        self, target: EventLog | None = None, which: str | Sequence[tuple[int, int]] | None = None
    ) -> dict[str, int]:
        """Writes events again as they were: original key, bytes and headers -> counts.

        target: where to; the log that they came from if None. which: a reason, places in the dead log, or None for all.
        Counts: `resubmitted`; `already` (not twice, a marker in the dead log says so); `gone` (too long to have been
        copied, and no longer in the log that they came from); `unknown` (no letter stands at that place).
        A crash between the event and its marker sends it again: readers know it by source and id.
        """
        target = self.log if target is None else target
        marked: set[tuple[int, int]] = set()
        chosen = self._choose(which)
        wanted = [
            _letter(record, letter, set())
            for record, letter in self._scan(marked)
            if chosen((record.partition, record.offset), letter.reason)
        ]
        counts = {"resubmitted": 0, "already": 0, "gone": 0, "unknown": 0}
        if which is not None and not isinstance(which, str):
            counts["unknown"] = len(set(which)) - len(wanted)
        waiting = [letter for letter in wanted if letter.place not in marked]
        counts["already"] = len(wanted) - len(waiting)
        for start in range(0, len(waiting), _CHUNK):
            found = [(letter, self._original(letter)) for letter in waiting[start : start + _CHUNK]]
            sent = [(letter, original) for letter, original in found if original is not None]
            counts["gone"] += len(found) - len(sent)
            if sent:
                target.append([(key, value) for _, (key, value, _) in sent], [headers for _, (_, _, headers) in sent])
                now = self._clock()
                self.dead.append([(letter.key, msgspec.json.encode(_Marker(letter.place, now))) for letter, _ in sent])
                counts["resubmitted"] += len(sent)
        return counts

    def close(self) -> None:
        self.dead.close()

    @staticmethod
    def _choose(which: str | Sequence[tuple[int, int]] | None) -> Callable[[tuple[int, int], str], bool]:
        if which is None:
            return lambda place, reason: True
        if isinstance(which, str):
            return lambda place, reason: reason == which
        places = set(which)
        return lambda place, reason: place in places

    def _scan(self, marked: set[tuple[int, int]]) -> Iterator[tuple[LogRecord, _Record]]:
        """Every letter, by partition and offset; places of resubmitted ones go into `marked`."""
        ends = self.dead.ends()
        for partition, begin in self.dead.begins().items():
            if begin >= ends[partition]:
                continue
            for record in self.dead.read({partition: begin}, ends[partition] - begin):
                try:
                    yield record, _RECORD.decode(record.value)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    marker = _marker(record.value)
                    if marker is not None:
                        marked.add(marker.resubmitted)

    def _original(self, letter: Letter) -> tuple[str, bytes, Headers] | None:
        """Key, bytes and headers as they were; None where they are gone."""
        if letter.value is not None:
            return letter.key, letter.value, letter.headers
        if letter.stream != self.log.identity or letter.row >= 0:
            return None
        try:
            for record in self.log.read({letter.partition: letter.offset}, 1):
                if record.offset == letter.offset and hashlib.sha256(record.value).hexdigest() == letter.sha256:
                    return record.key, record.value, record.headers
        except LogUnavailable:
            raise
        except EventError:
            return None
        return None

    def _recover(self) -> None:
        """Knows the positions of the dead log's tail."""
        begins = self.dead.begins()
        for partition, end in self.dead.ends().items():
            begin = max(begins.get(partition, 0), end - self._remembered)
            if begin >= end:
                continue
            for record in self.dead.read({partition: begin}, end - begin):
                try:
                    letter = _RECORD.decode(record.value)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue
                self._remember((letter.stream, letter.partition, letter.offset, letter.row))
        self._stale = False

    def _remember(self, position: _Position) -> None:
        self._written[position] = None
        self._written.move_to_end(position)
        while len(self._written) > self._remembered:
            self._written.popitem(last=False)


def _short(key: str) -> str:
    return key.encode()[:_MOST_KEY].decode(errors="ignore")


def _stored(letter: Dead, stream: str, now: float) -> bytes:
    key = _short(letter.key)
    size = len(letter.value) + sum(6 * len(name) + len(data) for name, data in letter.headers)  # escapes take 6
    whole = size <= MOST_BYTES and key == letter.key
    return msgspec.json.encode(
        _Record(
            reason=str(letter.reason),
            detail=letter.detail,
            stream=stream,
            partition=letter.partition,
            offset=letter.offset,
            key=key,
            size=len(letter.value),
            sha256=hashlib.sha256(letter.value).hexdigest(),
            first_seen=now,
            headers=list(letter.headers) if whole else [],
            value=letter.value if whole else None,
            row=letter.row,
        )
    )


def _marker(value: bytes) -> _Marker | None:
    try:
        return _MARKER.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _letter(record: LogRecord, stored: _Record, marked: set[tuple[int, int]]) -> Letter:
    place = (record.partition, record.offset)
    return Letter(
        place=place,
        reason=stored.reason,
        detail=stored.detail,
        stream=stored.stream,
        partition=stored.partition,
        offset=stored.offset,
        row=stored.row,
        key=stored.key,
        value=stored.value,
        headers=tuple((name, value) for name, value in stored.headers),
        size=stored.size,
        sha256=stored.sha256,
        first_seen=stored.first_seen,
        resubmitted=place in marked,
    )
