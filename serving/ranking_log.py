"""What was answered, as `ranking` events: a learner joins clicks to them, and trains on the values that were served."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from engine.components import EventLog
from engine.errors import PlexrankError
from engine.events import RankedItem, RankingData
from engine.hashing import canonical
from engine.pipeline import UNFIT_FEATURES, Answer
from engine.schema import Schema
from engine.served import Served, user_values

log = logging.getLogger("plexrank.events")

SOURCE = "plexrank"
MOST_BYTES = 900_000
"""Of one event: brokers take a record of 1 MB."""

_GATHERED_SECONDS = 0.02
"""Answers of so long are written together: one thread woken, one append, while requests go on."""
_PIECE_BYTES = 1 << 14
_QUEUED = 2_000
_BATCH = 64
_REMEMBERED_SECONDS = 120.0
"""For how long it is known that a user was forgotten: longer than any answer is on its way."""


class RankingEvent(msgspec.Struct):
    """A CloudEvent of kind `ranking`, as this server writes it."""

    id: str
    source: str
    specversion: str
    type: str
    time: str
    data: RankingData


def ranking_event(answer: Answer, served: Served, most: int, moment: float) -> tuple[str, bytes]:
    """An answer -> (key, CloudEvent in JSON): at most `most` items, with the values that the scorer was asked with.

    key: the user; of an answer for nobody, its request id, which then also stands for the user.
    """
    schema, trace, query = served.schema, answer.trace, answer.trace.query
    state = trace.state
    if UNFIT_FEATURES in answer.degraded:
        state = type(state)(state.user, {}, state.history, state.times, state.seen)
    items = answer.items[:most]
    key = answer.user or answer.request_id
    event = RankingEvent(
        answer.request_id,
        SOURCE,
        "1.0",
        "ranking",
        datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z"),
        RankingData(
            request_id=answer.request_id,
            user=key,
            items=list(
                map(
                    RankedItem,
                    items,
                    answer.scores[:most].tolist(),
                    range(1, len(items) + 1),
                    answer.propensity[:most].tolist(),
                )
            ),
            model=answer.model,
            version=answer.version,
            arms=[],
            user_features=_of_model(schema, user_values(schema, state, query.features)),
            context=_of_model(schema, query.context),
            history=[canonical(item) for item in state.history[: _longest(schema)]],
            item_features=_item_features(served, items, trace.item_features) or None,
            shown=len(answer.items) if len(answer.items) > most else None,
        ),
    )
    return key, _encode(event)


def _item_features(served: Served, items: Sequence[str], given: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """What was not the bundle's: values of the request, and where it had none, those that events gave the catalogue."""
    found = {name: list(values[: len(items)]) for name, values in given.items()}
    if served.catalogue.changed:
        for name, values in served.changed_items(served.catalogue.rows(items)).items():
            own = found.get(name, [None] * len(items))
            found[name] = [there if mine is None else mine for mine, there in zip(own, values, strict=True)]
    return found


def _longest(schema: Schema) -> int:
    """History items that the model reads."""
    return max((sequence.max_length for sequence in schema.sequences), default=0)


def _of_model(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the model reads: nothing else of a user goes into the log."""
    names = {f.name for f in schema.of_request() if f.kind != "sequence"}
    return {name: value for name, value in values.items() if name in names}


_encode = msgspec.json.Encoder(enc_hook=lambda value: value.tolist()).encode
"""numpy's numbers, from a store, as JSON's."""


def _pieces(events: Sequence[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """What is appended at once: so little that the room for others is looked at often enough."""
    piece: list[tuple[str, bytes]] = []
    size = 0
    for event in events:
        if piece and size + len(event[1]) > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(event)
        size += len(event[1])
    if piece:
        yield piece


@dataclass
class Counts:
    logged: int = 0
    unlogged: int = 0


class RankingLog:
    """Writes answers to the log in a thread of its own. `add` never waits: one too many is only counted."""

    def __init__(
        self, events: EventLog, served: Callable[[], Served], most: int, room: Callable[[], bool] = lambda: True
    ) -> None:
        """served: what serves now. most: items of an answer in its event. room: whether rankings may be written."""
        self.events, self.served, self.most, self.room = events, served, most, room
        self.counts = Counts()
        self._queue: queue.Queue[tuple[Answer, Served, float] | threading.Event | None] = queue.Queue(_QUEUED)
        self._writing = threading.Lock()
        self._forgotten: dict[str, float] = {}
        self._closed = False
        self._told = 0.0
        self._thread = threading.Thread(target=self._run, name="plexrank-rankings", daemon=True)
        self._thread.start()

    def add(self, answer: Answer) -> None:
        """Takes an answer to write it soon."""
        try:
            self._queue.put_nowait((answer, self.served(), time.time()))
        except queue.Full:
            self._lost(1, "they come faster than they are written")

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until the answers until now are in the log, or counted -> whether that came in time."""
        mark = threading.Event()
        self._queue.put(mark, timeout=timeout)
        return mark.wait(timeout)

    def forget(self, user: str) -> None:
        """None of a user's answers until now is written after this returns."""
        with self._writing:
            self._forgotten[user] = time.time()

    def _run(self) -> None:
        ends = False
        while not ends:
            batch = [self._queue.get()]
            if isinstance(batch[0], tuple):
                time.sleep(_GATHERED_SECONDS)
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            ends = None in batch
            with self._writing:
                self._write([answer for answer in batch if isinstance(answer, tuple)])
                old = time.time() - _REMEMBERED_SECONDS
                self._forgotten = {user: then for user, then in self._forgotten.items() if then > old}
            for mark in batch:
                if isinstance(mark, threading.Event):
                    mark.set()

    def _write(self, answers: Sequence[tuple[Answer, Served, float]]) -> None:
        events = []
        for answer, served, moment in answers:
            if moment <= self._forgotten.get(answer.user, 0.0):
                continue
            try:
                event = ranking_event(answer, served, self.most, moment)
            except Exception as error:
                self._lost(1, f"{type(error).__name__}: {error}")
                continue
            if len(event[1]) > MOST_BYTES:
                self._lost(1, f"one has {len(event[1])} bytes; lower serving.log_items")
            else:
                events.append(event)
        for piece in _pieces(events):
            try:
                if not self.room():
                    raise PlexrankError("the log is away, and the room left on this machine is for what users did")
                self.events.append(piece)
            except Exception as error:
                self._lost(len(piece), f"{type(error).__name__}: {error}")
            else:
                self.counts.logged += len(piece)

    def _lost(self, count: int, why: str) -> None:
        """Counts, and says so now and then."""
        self.counts.unlogged += count
        if time.monotonic() - self._told > 10.0:
            self._told = time.monotonic()
            log.warning("rankings are not logged (%d by now): %s", self.counts.unlogged, why)

    def close(self) -> None:
        """Writes what is queued, for a few seconds at most."""
        try:
            self._queue.put(None, timeout=5.0)
        except queue.Full:
            return
        self._thread.join(timeout=10.0)
