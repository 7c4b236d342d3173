"""Reads the partitions that a group gives to this learner, and says when they come and go."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import LogUnavailable
from engine.streaming.fetch import AHEAD, Chunk

log = logging.getLogger("plexrank.learning")

T = TypeVar("T")

_PATIENCE = (0.1, 2.0)  # seconds between two attempts at a log that does not answer, at first and at most
_POLL = 0.05


@dataclass(frozen=True)
class Given:
    """The group gave a partition to this learner, for the `turn`-th time that it gave anything."""

    partition: int
    turn: int


@dataclass(frozen=True)
class Taken:
    """The group took a partition away; no chunk of it follows."""

    partition: int


class GroupFetcher:
    """Chunks of the partitions that `begin` was called for, between their `Given` and their `Taken`.

    The group decides who should learn from a partition, not who may: that is a lock's to say. Where a partition begins
    is the learner's to say, whatever the group remembers.
    """

    def __init__(self, source: EventLog, group: str, chunk: int, ahead: int = AHEAD) -> None:
        self.trouble: str | None = None
        self.paused = 0
        self.done = False
        self._source, self._group, self._chunk = source, group, chunk
        self._turns = 0
        self._given: dict[int, int] = {}  # partition -> turn
        self._next: dict[int, int] = {}  # of those that are read
        self._begin: queue.SimpleQueue[tuple[Given, int]] = queue.SimpleQueue()
        self._commit: dict[int, int] | None = None
        self._lag: dict[int, int] = {}
        self._queue: queue.Queue[Chunk | Given | Taken | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plexrank-fetch", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Chunk | Given | Taken | None:
        """What comes next; None where nothing came in `timeout` seconds. Errors of the log are raised."""
        try:
            found = self._queue.get(timeout=timeout) if timeout > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    def begin(self, given: Given, offset: int) -> None:
        """Reads a partition from there, unless it was taken away meanwhile."""
        self._begin.put((given, offset))

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tells the group how far the checkpoint is, for whoever watches its lag."""
        self._commit = dict(positions)

    def lag(self) -> dict[int, int]:
        return dict(self._lag)

    def close(self) -> None:
        """Leaves the group."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.02)

    # ------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        reader = self._source.reader(None, self._group)
        try:
            while not self._stop.is_set():
                records = self._patiently(lambda: reader.poll(self._chunk, _POLL)) or []
                self._compare(reader)
                self._begin_some(reader)
                self._hand_over(records, reader)
                self._tell(reader)
                self._lag = {p: n for p, n in reader.lag().items() if p in self._next}
        except BaseException as error:
            self._put(error, reader)
        finally:
            reader.close()

    def _compare(self, reader: LogReader) -> None:
        now = set(reader.positions)
        for partition in sorted(self._given.keys() - now):
            del self._given[partition]
            self._next.pop(partition, None)
            self._put(Taken(partition), reader)
        for partition in sorted(now - self._given.keys()):
            reader.pause([partition])
            self._turns += 1
            self._given[partition] = self._turns
            self._put(Given(partition, self._turns), reader)

    def _begin_some(self, reader: LogReader) -> None:
        while not self._begin.empty():
            given, offset = self._begin.get()
            if self._given.get(given.partition) == given.turn:
                self._next[given.partition] = offset
                reader.seek({given.partition: offset})
                reader.resume([given.partition])

    def _hand_over(self, records: list[LogRecord], reader: LogReader) -> None:
        """What comes again when the group shares anew, or came before its partition was begun, is left out."""
        for partition, some in groupby(sorted(records, key=lambda r: r.partition), lambda r: r.partition):
            its = [r for r in some if r.offset >= self._next.get(partition, r.offset + 1)]
            if its:
                self._next[partition] = its[-1].offset + 1
                self._put(Chunk(partition, its, its[-1].offset + 1), reader)

    def _tell(self, reader: LogReader) -> None:
        positions, self._commit = self._commit, None
        if positions:
            try:
                reader.commit({p: offset for p, offset in positions.items() if p in self._next})
            except LogUnavailable as error:
                log.debug("the group is not told: %s", error)

    def _patiently(self, ask: Callable[[], T]) -> T | None:
        wait = _PATIENCE[0]
        while not self._stop.is_set():
            try:
                found = ask()
                self.trouble = None
                return found
            except LogUnavailable as error:
                if self.trouble is None:
                    log.warning("the event log does not answer: %s", error)
                self.trouble = str(error)
                self._stop.wait(wait)
                wait = min(2 * wait, _PATIENCE[1])
        return None

    def _put(self, found: Chunk | Given | Taken | BaseException, reader: LogReader) -> None:
        """While the learner is behind, partitions are paused and the membership is kept alive."""
        held = False
        while not self._stop.is_set():
            try:
                self._queue.put(found, timeout=0.2)
                break
            except queue.Full:
                if isinstance(found, BaseException):
                    continue
                if not held:
                    held, self.paused = True, self.paused + 1
                    reader.pause(sorted(self._next))
                self._patiently(lambda: reader.poll(1, 0.0))
        if held:
            reader.resume(sorted(self._next))
