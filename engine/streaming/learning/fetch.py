"""Reads ahead of the learner in a thread of its own; where the learner is behind, partitions are paused."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import LogUnavailable

log = logging.getLogger("plexrank.learning")

T = TypeVar("T")

AHEAD = 4
"""Chunks that wait for the learner before fetching pauses."""
CHUNK_BYTES = 8 << 20
"""Of a chunk's values, but for the last record: batches of events are large, and become larger when they are read."""
_FIRST_GUESS = 64 << 10  # bytes of a record, until some came
_PATIENCE = (0.1, 2.0)  # seconds between two attempts at a log that does not answer, at first and at most
_POLL = 0.05


@dataclass(frozen=True, eq=False)
class Chunk:
    """Records of one partition, in order. next: offset behind the last. ended: the partition is read up to its end as
    it was at the start."""

    partition: int
    records: Sequence[LogRecord]
    next: int
    ended: bool = False


@dataclass(frozen=True)
class Given:
    """A group gave a partition to this learner, for the `turn`-th time that it gave anything."""

    partition: int
    turn: int


@dataclass(frozen=True)
class Taken:
    """A group took a partition away; no chunk of it follows."""

    partition: int


Fetched = Chunk | Given | Taken


class Fetcher:
    """Chunks of at most `chunk` records, or where `most_bytes` are reached.

    until: partition -> where it ends for this run. Then every partition in turn gives one whole chunk, so that the
    order follows from the log alone; `after` is the partition that had its turn last. None: goes on for ever, in the
    order in which records come, in chunks of about that size.
    Errors of the log are raised by `get`; while it does not answer, `trouble` says why.
    """

    def __init__(
        self,
        source: EventLog,
        positions: Mapping[int, int],
        chunk: int,
        *,
        until: Mapping[int, int] | None = None,
        after: int = -1,
        ahead: int = AHEAD,
        most_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.trouble: str | None = None
        self.paused = 0  # times that fetching had to wait for the learner
        self._source, self._positions, self._chunk = source, dict(positions), chunk
        self._until, self._after = until, after
        self._lag: dict[int, int] = {}
        self._readers: dict[int, LogReader] = {}
        self._most_bytes, self._each = most_bytes, float(_FIRST_GUESS)
        self._over: dict[int, list[LogRecord]] = {}  # read, and too much for the chunk before
        self._early: list[LogRecord] = []  # given by a reader that was paused
        self._queue: queue.Queue[Fetched | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plexrank-fetch", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Fetched | None:
        """The next chunk; None where none came in `timeout` seconds, or none will come any more (`done`)."""
        try:
            found = self._queue.get(timeout=timeout) if timeout > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    @property
    def done(self) -> bool:
        """Nothing comes any more."""
        return not self._thread.is_alive() and self._queue.empty()

    def lag(self) -> dict[int, int]:
        """partition -> records that are not fetched yet, as of the last look."""
        return dict(self._lag)

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.02)

    # ------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        try:
            for chunk in self._whole() if self._until is not None else self._as_they_come():
                if not self._put(chunk):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            for reader in self._readers.values():
                reader.close()

    def _reader(self, partitions: Sequence[int], name: int = -1) -> LogReader | None:
        """A reader of its own under a name; None: it is to stop."""
        if name not in self._readers:
            positions = {p: self._positions[p] for p in partitions}
            reader = self._patiently(lambda: self._source.reader(positions))
            if reader is None:
                return None
            self._readers[name] = reader
        return self._readers[name]

    def _as_they_come(self) -> Iterator[Fetched]:
        reader = self._reader(sorted(self._positions))
        while reader is not None and not self._stop.is_set():
            taken = self._patiently(partial(reader.poll, self._ask_for(self._chunk), _POLL)) or []
            self._weigh(taken)
            records, self._early = self._early + taken, []
            self._lag = reader.lag()
            for partition, some in groupby(sorted(records, key=lambda r: r.partition), lambda r: r.partition):
                its = list(some)
                yield Chunk(partition, its, its[-1].offset + 1)

    def _whole(self) -> Iterator[Chunk]:
        """In turn, beginning behind the partition that had its turn last; a reader each, so that none waits paused."""
        assert self._until is not None
        waiting = sorted(self._positions)
        turn = [p for p in waiting if p > self._after] + [p for p in waiting if p <= self._after]
        while turn and not self._stop.is_set():
            partition = turn.pop(0)
            chunk = self._fill(partition, self._until[partition])
            if chunk is None:
                return
            if chunk.ended:
                reader = self._readers.pop(partition, None)
                if reader is not None:
                    reader.close()
            else:
                turn.append(partition)
            self._lag[partition] = self._until[partition] - chunk.next
            yield chunk

    def _fill(self, partition: int, end: int) -> Chunk | None:
        """A whole chunk of one partition, or what is left of it up to its end; None: it is to stop."""
        records = self._over.pop(partition, [])
        while self._fitting(records) == len(records) < self._chunk and self._positions[partition] < end:
            reader = self._reader([partition], partition)
            if reader is None:
                return None
            left = self._ask_for(self._chunk - len(records))
            some = self._patiently(partial(reader.poll, left, 4 * _POLL))
            if some is None:
                return None
            self._weigh(some)
            records += [r for r in some if r.offset < end]
            self._positions[partition] = max(self._positions[partition], reader.positions[partition])
            if not some and next(iter(self._source.read({partition: self._positions[partition]}, 1)), None) is None:
                self._positions[partition] = end  # what stands before it was erased
        records, over = records[: (count := self._fitting(records))], records[count:]
        if over:
            self._over[partition] = over
            return Chunk(partition, records, records[-1].offset + 1)
        at = min(self._positions[partition], end)
        return Chunk(partition, records, at, ended=at >= end)

    def _fitting(self, records: Sequence[LogRecord]) -> int:
        """How many of them make a chunk, or may be in one that has room for more."""
        size = 0
        for count, record in enumerate(records[: self._chunk], 1):
            size += len(record.value)
            if size >= self._most_bytes:
                return count
        return min(len(records), self._chunk)

    def _ask_for(self, most: int) -> int:
        """As many records as are likely to make a chunk."""
        return max(1, min(most, int(self._most_bytes / self._each)))

    def _weigh(self, records: Sequence[LogRecord]) -> None:
        if records:
            self._each = max(1.0, sum(len(record.value) for record in records) / len(records))

    def _patiently(self, ask: Callable[[], T]) -> T | None:
        """Asks until the log answers; None: it is to stop."""
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

    def _put(self, chunk: Fetched | BaseException | None) -> bool:
        """Hands a chunk over; while the learner is behind, partitions are paused and a membership is kept alive."""
        held, reader = False, self._readers.get(-1)
        while not self._stop.is_set():
            try:
                self._queue.put(chunk, timeout=0.2)
                if held and reader is not None:
                    reader.resume(sorted(self._positions))
                return True
            except queue.Full:
                if not held:
                    held, self.paused = True, self.paused + 1
                    if reader is not None:
                        reader.pause(sorted(self._positions))
                if reader is not None:
                    self._early += self._patiently(lambda: reader.poll(1, 0.0)) or []
        return False
