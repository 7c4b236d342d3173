"""Where a reader stands in one partition of the log, and what comes next."""

from __future__ import annotations

from engine.components import LogRecord
from engine.errors import LogGap
from plugins.events.partition import Partition
from plugins.events.segment import Segment


class Tail:
    """Goes on from the byte where it stopped, while the partition grows, rolls, retires and compacts under it."""

    def __init__(self, partition: Partition, offset: int) -> None:
        self.offset = offset
        self._partition = partition
        self._segment: Segment | None = None
        self._at = 0

    def take(self, limit: int) -> list[LogRecord]:
        """At most `limit` records, [] at the end. LogGap where the offset is not in the log."""
        taken: list[LogRecord] = []
        if not self._partition.writes:
            self._partition.tombstones.refresh()
            if self._segment is not None and self._segment.replaced():
                self._segment = None  # by a compaction, after which the tombstones go
        while len(taken) < limit:
            if self._segment is None and not self._seat():
                break
            self._walk(taken, limit, whole=False)
            if len(taken) >= limit:
                break
            segments = self._partition.segments()
            if self._segment not in segments:  # compacted, retired, or the log was begun anew
                self._segment = None
                continue
            place = segments.index(self._segment) + 1
            if place == len(segments):
                break
            self._walk(taken, limit, whole=True)  # what was added before the next file began
            if len(taken) < limit:
                self._segment = segments[place]
                self._at = self._segment.begins
                self.offset = max(self.offset, self._segment.base)
        return taken

    def _walk(self, taken: list[LogRecord], limit: int, *, whole: bool) -> None:
        segment = self._segment
        assert segment is not None
        hides = self._partition.tombstones.hides
        until = segment.size if self._partition.writes else segment.file_bytes
        for record, end in segment.walk(self.offset, until, whole=whole, at=self._at):
            self._at, self.offset = end, record.offset + 1
            if not hides(record.key, record.offset):
                taken.append(record)
                if len(taken) >= limit:
                    return

    def _seat(self) -> bool:
        """Finds the file and byte of the offset; False where there is nothing yet."""
        folder, end = self._partition.folder, self._partition.end
        segments = self._partition.segments()
        begin = segments[0].base if segments else 0
        if self.offset < begin:
            raise LogGap(
                f"{folder}: offset {self.offset} is no longer there, the oldest is {begin}: retention was quicker than "
                "the reader; begin at the oldest or the newest, or from a newer checkpoint"
            )
        if self.offset > end:
            raise LogGap(
                f"{folder}: offset {self.offset} lies beyond the end, {end}: the log was begun anew or cut; "
                "begin at the oldest or the newest, or from a checkpoint of this log"
            )
        if not segments:
            return False
        self._segment = next(segment for segment in reversed(segments) if segment.base <= self.offset)
        at_end = self._segment is segments[-1] and self.offset == self._segment.next_offset
        self._at = self._segment.size if at_end else self._segment.place(self.offset)
        return True
