"""Reads the partitions that a group gives to this learner, and says when they come and go."""

from __future__ import annotations

import logging
import queue
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
    is the learner's to say, whatever the group remembers.
    """

    def __init__(self, source: EventLog, group: str, chunk: int) -> None:
        self._group, self._turns = group, 0
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

    # ------------------------------------------------------------------------------------------- the thread
    def _as_they_come(self) -> Iterator[Fetched]:
        reader = self._patiently(lambda: self._source.reader(None, self._group))
        if reader is None:
            return
        self._readers[-1] = reader
        while not self._stop.is_set():
            taken = self._patiently(partial(reader.poll, self._ask_for(self._chunk), _POLL)) or []
            self._weigh(taken)
            records, self._early = self._early + taken, []
            yield from self._changes(reader)
            self._begin_some(reader)  # behind a poll, which makes room for what was given
            yield from self._chunks(records)
            self._tell(reader)
            self._lag = {p: n for p, n in reader.lag().items() if p in self._positions}

    def _changes(self, reader: LogReader) -> Iterator[Fetched]:
        now = set(reader.positions)
        for partition in sorted(self._given.keys() - now):
            del self._given[partition]
            self._positions.pop(partition, None)
            yield Taken(partition)
        for partition in sorted(now - self._given.keys()):
            reader.pause([partition])
            self._turns += 1
            self._given[partition] = self._turns
            yield Given(partition, self._turns)

    def _begin_some(self, reader: LogReader) -> None:
        while not self._begin.empty():
            given, offset = self._begin.get()
            if self._given.get(given.partition) == given.turn:
                self._positions[given.partition] = offset
                reader.seek({given.partition: offset})
                reader.resume([given.partition])

    def _chunks(self, records: Sequence[LogRecord]) -> Iterator[Chunk]:
        """What comes again when the group shares anew, or came before its partition was begun, is left out."""
        for partition, some in groupby(sorted(records, key=lambda r: r.partition), lambda r: r.partition):
            its = [r for r in some if r.offset >= self._positions.get(partition, r.offset + 1)]
            if its:
                self._positions[partition] = its[-1].offset + 1
                yield Chunk(partition, its, its[-1].offset + 1)

    def _tell(self, reader: LogReader) -> None:
        positions, self._commit = self._commit, None
        if positions:
            try:
                reader.commit({p: offset for p, offset in positions.items() if p in self._positions})
            except LogUnavailable as error:
                log.debug("the group is not told: %s", error)
