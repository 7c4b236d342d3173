"""Reads the partitions that a group gives to this learner, and says when they come and go."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import LogUnavailable
from engine.streaming.learning.fetch import Chunk, Fetched, Fetcher, Given, Taken

log = logging.getLogger("plexrank.learning")

_POLL = 0.05


class GroupFetcher(Fetcher):
    """Chunks of the partitions that `begin` was called for, between their `Given` and their `Taken`.

    The group decides who should learn from a partition, not who may: that is a lock's to say. Where a partition begins
    is the learner's to say, whatever the group remembers. ends: partition -> where it ends for this run; an empty chunk
    says that it is read up to there, and no more comes of it. `finish` ends it all.
    """

    def __init__(self, source: EventLog, group: str, chunk: int, ends: Mapping[int, int] | None = None) -> None:
        self._group, self._turns = group, 0
        self._ends, self._ended = dict(ends or {}), set[int]()
        self._finished = threading.Event()
        self._given: dict[int, int] = {}  # partition -> turn
        self._begin: queue.SimpleQueue[tuple[Given, int]] = queue.SimpleQueue()
        self._commit: dict[int, int] | None = None
        super().__init__(source, {}, chunk)

    def begin(self, given: Given, offset: int) -> None:
        """Reads a partition from there, unless it was taken away meanwhile."""
        self._begin.put((given, offset))

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tells the group how far the checkpoint is, for whoever watches its lag."""
        self._commit = dict(positions)

    def finish(self) -> None:
        """Leaves the group; `done` once what was fetched is taken."""
        self._finished.set()

    # ------------------------------------------------------------------------------------------- the thread
    def _as_they_come(self) -> Iterator[Fetched]:
        reader = self._patiently(lambda: self._source.reader(None, self._group))
        if reader is None:
            return
        self._readers[-1] = reader
        while not self._stop.is_set() and not self._finished.is_set():
            taken = self._patiently(partial(reader.poll, self._ask_for(self._chunk), _POLL)) or []
            self._weigh(taken)
            records, self._early = self._early + taken, []
            at = {p: offset for p, offset in reader.positions.items() if p in self._positions}
            yield from self._changes(reader)
            self._begin_some(reader)  # behind a poll, which makes room for what was given
            yield from self._chunks(records)
            yield from self._at_ends(reader, at)
            self._tell(reader)
            self._lag = {p: n for p, n in reader.lag().items() if p in self._positions}

    def _changes(self, reader: LogReader) -> Iterator[Fetched]:
        now = set(reader.positions)
        for partition in sorted(self._given.keys() - now):
            del self._given[partition]
            self._positions.pop(partition, None)
            self._ended.discard(partition)
            yield Taken(partition)
        for partition in sorted(now - self._given.keys()):
            reader.pause([partition])
            self._turns += 1
            self._given[partition] = self._turns
            yield Given(partition, self._turns)

    def _begin_some(self, reader: LogReader) -> None:
        for _ in range(self._begin.qsize()):
            given, offset = self._begin.get()
            if self._given.get(given.partition) == given.turn:
                try:
                    reader.seek({given.partition: offset})
                    reader.resume([given.partition])
                except LogUnavailable as error:  # a client may not have made room for it yet
                    log.debug("partition %d is begun later: %s", given.partition, error)
                    self._begin.put((given, offset))
                else:
                    self._positions[given.partition] = offset

    def _chunks(self, records: Sequence[LogRecord]) -> Iterator[Chunk]:
        """What comes again when the group shares anew, or came before its partition was begun, is left out."""
        for partition, some in groupby(sorted(records, key=lambda r: r.partition), lambda r: r.partition):
            at, end = self._positions.get(partition, math.inf), self._ends.get(partition, math.inf)
            its = [r for r in some if at <= r.offset < end]
            if its:
                self._positions[partition] = its[-1].offset + 1
                yield Chunk(partition, its, its[-1].offset + 1)

    def _at_ends(self, reader: LogReader, at: Mapping[int, int]) -> Iterator[Chunk]:
        """Partitions that are read up to their ends. at: where the reader stood behind all that was handed over."""
        for partition, offset in at.items():
            end = self._ends.get(partition)
            if end is None or offset < end or partition in self._ended or partition not in self._positions:
                continue
            self._ended.add(partition)
            reader.pause([partition])
            self._positions[partition] = max(end, self._positions[partition])
            yield Chunk(partition, [], self._positions[partition], ended=True)

    def _tell(self, reader: LogReader) -> None:
        positions, self._commit = self._commit, None
        if positions:
            try:
                reader.commit({p: offset for p, offset in positions.items() if p in self._positions})
            except LogUnavailable as error:
                log.debug("the group is not told: %s", error)
