"""What other servers were told of items: the item events of the log, in its order, for a server's own catalogue.

An event is posted to one server, and every server of the log answers with its items. Each reads the log in a thread
aside of requests and takes the events of kind `item`; records of other kinds are passed over by a look at their bytes.

A server applies what is posted to it at once and passes it over in the log. The log's order decides in the end: events
of an item are in one partition, and where another server's event of the same item is met before the own one, the own
one is applied once more when its turn comes. So all servers end with the same items.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import EventError, LogGap
from engine.events import Event, EventLimits, ItemData
from engine.files import write_whole
from engine.hashing import canonical
from engine.streaming.events.arrow_events import is_batch
from engine.streaming.events.binary_mode import is_binary
from engine.streaming.events.decode import decode_records

log = logging.getLogger("plexrank.items")

REMEMBERED = 100_000
"""Newest events that are known again."""
_RECORDS = 2000
_POLL_SECONDS = 0.1
_REST_SECONDS = 0.05
"""Between two looks at the log: items enter together every 0.1 s anyway."""
_SAVE_SECONDS = 5.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0

_NAME = b'"type"'
_ITEM = re.compile(rb'"type"\s*:\s*"(?:[A-Za-z0-9_.-]*\.)?item"')
_ESCAPE = b"\\u00"
"""In JSON it may spell a letter of the name or the type."""

_Pair = tuple[str, str]


class Items(Protocol):
    """Where events go (`engine.live_items.LiveItems`)."""

    def add_events(self, events: Iterable[Event]) -> None: ...

    def keep(self, timeout: float) -> bool: ...


class Place(msgspec.Struct, frozen=True):
    """Where a server stands in the log of this identity: partition -> next offset; since: where it began to read."""

    log: str
    positions: dict[int, Annotated[int, msgspec.Meta(ge=0)]]
    since: dict[int, Annotated[int, msgspec.Meta(ge=0)]] = {}


class ItemTail:
    """Follows the log from `start` to `close`. `own` takes the events that were posted here; safe from many threads.

    The place is kept in a file, after the items before it are kept. Without one the log is read from `learnt`, the
    positions that the bundle's catalogue was learnt up to, else from its oldest record. Where another bundle comes that
    was learnt from less of the log (`serves`), what is missing is read then.
    """

    def __init__(
        self,
        events: EventLog,
        items: Items,
        path: Path,
        *,
        limits: EventLimits | None = None,
        learnt: Place | None = None,
    ) -> None:
        self.log, self.items, self.path, self.learnt = events, items, path, learnt
        self.limits = limits or EventLimits()
        self.taken = 0  # events of other servers
        self.lag = 0  # records that are not read yet, as far as is known
        self.trouble: str | None = None  # why the log is not followed now
        self._own: OrderedDict[_Pair, str] = OrderedDict()  # applied, and not met in the log yet -> the item
        self._open: dict[str, list[_Pair]] = {}  # item -> which of these are its, as they were applied
        self._crossed: set[str] = set()  # items of these whose events stand in another order in the log
        self._met: OrderedDict[_Pair, None] = OrderedDict()
        self._order = threading.Lock()
        self._reader: LogReader | None = None
        self._identity: str | None = None
        self._at: dict[int, int] = {}
        self._since: dict[int, int] = {}
        self._other = threading.Event()  # another bundle serves
        self._saved: dict[int, int] = {}
        self._saved_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plexrank-item-tail", daemon=True)

    def start(self) -> ItemTail:
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)

    @property
    def own_open(self) -> int:
        """Events that were posted here and not met in the log yet."""
        return len(self._own)

    def serves(self, learnt: Place | None) -> None:
        """Another bundle serves, whose catalogue was learnt up to there; None: from nothing of the log."""
        self.learnt = learnt
        self._other.set()

    def own(self, events: Sequence[Event]) -> None:
        """Events that are durable, posted here or read again after a start: they enter now."""
        with self._order:
            fresh = [event for event in events if (event.source, event.id) not in self._met]
            for event in fresh:
                self._expect(event)
            self.items.add_events(fresh)

    # ---------------------------------------------------------------------------------------------- the loop
    def _run(self) -> None:
        pause = _SHORTEST_PAUSE
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                some = self._step()
                pause, self.trouble = _SHORTEST_PAUSE, None
                # while there is much to catch up with, requests have the machine for at least half of the time
                self._stop.wait(max(_REST_SECONDS, time.monotonic() - begin if some else 0.0))
            except Exception as error:
                if not isinstance(error, EventError):
                    log.exception("item events of the log cannot be taken")
                elif self.trouble is None:
                    log.warning("item events of other servers are not followed: %s", error)
                self.trouble = str(error) or type(error).__name__
                self._let_go()
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        self._save()
        self._let_go()

    def _step(self) -> int:
        """Takes the next records -> how many."""
        if self._other.is_set():
            self._other.clear()
            self._go_back()
        reader = self._reader
        if reader is None:
            if self._identity != (identity := self.log.identity):
                self._begin(identity)
            reader = self._reader = self.log.reader(self._at)
        try:
            records = reader.poll(_RECORDS, _POLL_SECONDS)
        except LogGap as error:
            log.warning("item events are read again from the log's oldest record: %s", error)
            self._let_go()
            self._at = self.log.begins()
            return 0
        self.take(records)
        self._at, self.lag = dict(reader.positions), sum(reader.lag().values())
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._save()
        return len(records)

    def take(self, records: Sequence[LogRecord]) -> None:
        """Of the log's next records the item events that are not in yet, in their order."""
        chosen = [record for record in records if may_be_item(record)]
        if not chosen:
            return
        events = decode_records(chosen, self.limits, time.time(), float("inf")).items
        with self._order:
            fresh = [event for event in events if self._to_apply(event)]
            self.items.add_events(fresh)

    def _to_apply(self, event: Event) -> bool:
        """Whether an event that is met in the log changes anything."""
        pair = (event.source, event.id)
        if pair in self._met:
            return False
        self._met[pair] = None
        if len(self._met) > REMEMBERED:
            self._met.popitem(last=False)
        item = _item(event)
        if pair in self._own:
            if self._open[item][0] != pair:
                self._crossed.add(item)
            again = item in self._crossed
            self._forget(pair)
            return again
        if item in self._open:
            self._crossed.add(item)
        self.taken += 1
        return True

    # ------------------------------------------------------------------------------------------- own events
    def _expect(self, event: Event) -> None:
        pair, item = (event.source, event.id), _item(event)
        if pair in self._own:
            return
        self._own[pair] = item
        self._open.setdefault(item, []).append(pair)
        if len(self._own) > REMEMBERED:
            self._forget(next(iter(self._own)))

    def _forget(self, pair: _Pair) -> None:
        item = self._own.pop(pair)
        self._open[item].remove(pair)
        if not self._open[item]:
            del self._open[item]
            self._crossed.discard(item)

    # --------------------------------------------------------------------------------------------- the place
    def _begin(self, identity: str) -> None:
        """In a log that was not read by this server yet, since its start."""
        begins = self.log.begins()
        kept = self._kept() if self._identity is None else None
        if kept is not None and kept.log == identity:
            self._at, self._since = _within(kept.positions, begins), _within(kept.since, begins)
        else:
            self._at = self._since = self._learnt(identity, begins)
        self._identity = identity

    def _learnt(self, identity: str, begins: Mapping[int, int]) -> dict[int, int]:
        learnt = self.learnt
        return _within({} if learnt is None or learnt.log != identity else learnt.positions, begins)

    def _go_back(self) -> None:
        """To where the bundle's catalogue ends, if that was passed over; what was met since then is known again."""
        if self._identity is None:
            return
        begins = self.log.begins()
        needed, since = self._learnt(self._identity, begins), _within(self._since, begins)
        if any(needed[p] < since[p] for p in begins):
            self._let_go()
            self._at = {p: needed[p] if needed[p] < since[p] else self._at.get(p, needed[p]) for p in begins}
            self._since = {p: min(needed[p], since[p]) for p in begins}

    def _kept(self) -> Place | None:
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Place)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s: it does not say a place in the log, which is read again: %s", self.path, error)
            return None

    def _save(self) -> None:
        """The place, after what lies before it is kept; another time where that fails."""
        self._saved_at = time.monotonic()
        at = dict(self._at)
        if at == self._saved or not at:
            return
        try:
            if self.items.keep(1.0):
                place = Place(self._identity or "", at, self._since)
                write_whole(self.path, msgspec.json.encode(place), durable=False)
                self._saved = at
        except (OSError, EventError) as error:
            log.debug("%s: not written: %s", self.path, error)

    def _let_go(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def may_be_item(record: LogRecord) -> bool:
    """A look at a record's bytes: False for what is no event of kind `item`. Batches hold none."""
    if not record.value or is_batch(record):
        return False
    if record.headers and is_binary(record.headers):
        return any(name == "ce_type" and value.rpartition(b".")[2] == b"item" for name, value in record.headers)
    return _ESCAPE in record.value or _says_item(record.value)


def _says_item(value: bytes) -> bool:
    """A search for the name alone is four times as fast as one for the expression, and rankings are large."""
    at = value.find(_NAME)
    while at >= 0:
        if _ITEM.match(value, at):
            return True
        at = value.find(_NAME, at + len(_NAME))
    return False


def _within(positions: Mapping[int, int], begins: Mapping[int, int]) -> dict[int, int]:
    """For every partition; what lies beyond the end is left to the reader, as some brokers say too early an end."""
    return {p: max(begin, positions.get(p, begin)) for p, begin in begins.items()}


def learnt_place(figures: Mapping[str, object]) -> Place | None:
    """What a bundle's metrics say it was learnt up to."""
    learning = figures.get("learning")
    if not isinstance(learning, Mapping):
        return None
    try:
        found = {"log": learning.get("stream"), "positions": learning.get("positions")}
        return msgspec.convert(found, type=Place, strict=False)
    except msgspec.ValidationError:
        return None


def _item(event: Event) -> str:
    return canonical(event.data.item) if isinstance(event.data, ItemData) else ""
