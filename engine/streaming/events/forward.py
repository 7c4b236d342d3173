"""A log that goes on taking events while the one behind it is away: they wait on this machine and follow in order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engine.components import EventLog, LogRecord, PluginOptions
from engine.components.logs import LogReader
from engine.errors import EventError, LogUnavailable
from engine.streaming.events.spool import Spool

log = logging.getLogger("plexrank.events")

WAITING = (-1, -1)
"""The position of an event that is durable on this machine and has none in the log yet."""

_BATCH = 500
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_LOOK_SECONDS = 5.0
"""Between two looks at a log that is idle, so that the next event need not find out that it is away."""


class ForwardingLog(EventLog):
    """The configured log, and before it a spool for when it does not answer.

    `append` writes to the log; on LogUnavailable to the spool, durably, answering `WAITING` for each. From then on
    everything goes to the spool until a thread has forwarded it all, so a key's order is kept. An event whose
    acknowledgement was lost is sent again: readers know it by (source, id). The spool full: LogUnavailable.
    All else is asked of the log itself, and raises LogUnavailable while it is away.
    """

    name = "forwarding"

    def __init__(
        self,
        connect: Callable[[], EventLog],
        spool: Spool,
        refused: Callable[[list[LogRecord], str], None],
        *,
        observe: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """connect: opens the log, also later, where it raises LogUnavailable; what else it raises is raised here.

        refused: takes records that the log will never take (too large, say) and why. observe: hears of the seconds
        that an event waited.
        """
        super().__init__(PluginOptions())
        self._connect, self._refused, self.observe = connect, refused, observe
        self._order = threading.Lock()  # held where an event takes its place in the spool, or the spool ends
        self._connecting = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self.spool = spool
        self.dead = 0  # events that the log would not take
        self._log: EventLog | None = None
        self._waits = spool.waiting > 0
        try:
            self._behind()
        except LogUnavailable as error:
            self._away(error)
        self._thread = threading.Thread(target=self._run, name="plexrank-forward", daemon=True)
        self._thread.start()

    def _behind(self) -> EventLog:
        """The log; LogUnavailable while it cannot be opened."""
        with self._connecting:
            if self._log is None:
                self._log = self._connect()
            return self._log

    @property
    def waits(self) -> bool:
        """Whether events wait, or would."""
        return self._waits

    @property
    def waiting(self) -> int:
        """Events in the spool."""
        return self.spool.waiting

    # ---------------------------------------------------------------------------------------------- writing
    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> list[tuple[int, int]]:
        while events:
            if not self._waits:
                try:
                    return self._behind().append(events, headers)
                except LogUnavailable as error:
                    self._away(error)
            with self._order:
                if self._waits:  # it may have come back meanwhile
                    self.spool.append(events, headers)
                    return [WAITING] * len(events)
        return []

    def _away(self, error: LogUnavailable) -> None:
        with self._order:
            if not self._waits:
                log.warning("events wait on this machine from now on: %s", error)
            self._waits = True
        self._wake.set()

    # ------------------------------------------------------------------------------------------- forwarding
    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            if not self._waits:
                self._wake.wait(_LOOK_SECONDS)
                self._wake.clear()
            if self._stop.is_set():
                return
            try:
                if self._waits:
                    self._step()
                else:
                    self._behind().health()
                pause = _FIRST_PAUSE
            except Exception as error:
                if not isinstance(error, LogUnavailable):
                    log.exception("events cannot be forwarded")
                log.debug("not yet: %s", error)
                self._away(LogUnavailable(str(error)))
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _step(self) -> None:
        """Forwards some; the last ones while none is added, and then the log is written directly again.

        Nobody waits for a log that hangs: others are held up only when it has just answered.
        """
        behind = self._behind()
        if self.spool.waiting:
            self._send(behind, self.spool.head(_BATCH))
        else:
            behind.health()
        if self.spool.waiting > _BATCH:
            return
        with self._order:
            while records := self.spool.head(_BATCH):
                self._send(behind, records)
            self.spool.clear()
            self._waits = False
        log.warning("the event log is back, and nothing waits any more")

    def _send(self, behind: EventLog, records: list[LogRecord]) -> None:
        if not records:
            return
        try:
            _append(behind, records)
        except LogUnavailable:
            raise
        except EventError:
            self._one_by_one(behind, records)
        self.spool.forwarded(records)
        if records[0].seconds is not None:
            self.observe(max(0.0, time.time() - records[0].seconds))

    def _one_by_one(self, behind: EventLog, records: list[LogRecord]) -> None:
        """One of them is refused for good: it is put aside, and the others go on."""
        for record in records:
            try:
                _append(behind, [record])
            except LogUnavailable:
                raise
            except EventError as error:
                log.error("an event that waited is refused by the log: %s", error)
                self._refused([record], str(error))
                self.dead += 1

    # -------------------------------------------------------------------------------------- the log's own part
    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        return self._behind().read(positions, limit)

    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> LogReader:
        return self._behind().reader(positions, group)

    def begins(self) -> dict[int, int]:
        return self._behind().begins()

    def ends(self) -> dict[int, int]:
        return self._behind().ends()

    def position_at(self, seconds: float) -> dict[int, int]:
        return self._behind().position_at(seconds)

    def erase(self, key: str) -> int:
        """Of the spool first; then of the log, which must be there."""
        with self._order:
            waiting = self.spool.erase(key)
        gone = self._behind().erase(key)
        return gone if gone < 0 else gone + waiting

    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> Any:
        """A stream of the log itself: what is written to it does not wait here."""
        return self._behind().sibling(name, partitions=partitions, compact=compact)

    @property
    def identity(self) -> str:
        return self._behind().identity

    def health(self) -> None:
        if self._waits:
            raise LogUnavailable("the event log is away: events wait on this machine")
        self._behind().health()

    def close(self) -> None:
        """What waits is forwarded after the next start."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=10)
        with self._order:
            self.spool.close()
        if self._log is not None:
            self._log.close()


def _append(behind: EventLog, records: Sequence[LogRecord]) -> None:
    headers = [record.headers for record in records] if any(record.headers for record in records) else None
    behind.append([(record.key, record.value) for record in records], headers)
