"""Where events wait on this machine while the log they are meant for is away."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.components import EventLog, LogRecord
from engine.errors import LogUnavailable

log = logging.getLogger("plexrank.events")

_RECORD = 64
"""Bytes that a record takes beside its key and value, about."""
_LIMIT = 1 << 30


class Spool:
    """A durable queue over a log in a folder of its own, which goes when the last event has been forwarded.

    The position is written after an event was taken elsewhere: a crash between the two forwards it again, and none is
    lost. One thread may append while another forwards.
    """

    def __init__(self, folder: Path, open_log: Callable[[Path], EventLog], most_bytes: int) -> None:
        """open_log: opens, or begins, a log in a folder. most_bytes: what may wait before `append` refuses."""
        self.folder, self.most_bytes = folder, most_bytes
        self._open = open_log
        self._done = folder.with_name(f"{folder.name}.done")
        shutil.rmtree(self._done, ignore_errors=True)
        self._log: EventLog | None = None
        self._position: dict[int, int] = {}
        self.bytes = 0  # of all that came since it was last empty: the files are removed together
        if folder.exists():
            self._resume()

    def _resume(self) -> None:
        self._log = self._open(self.folder / "log")
        self._position = {**self._log.begins(), **self._read_position()}
        self.bytes = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def _read_position(self) -> dict[int, int]:
        """As written last; from the beginning where that cannot be read: events come twice rather than not at all."""
        try:
            found = json.loads((self.folder / "position.json").read_bytes())
            return {int(partition): int(offset) for partition, offset in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    @property
    def waiting(self) -> int:
        """Events that are not forwarded yet."""
        log_, position = self._log, self._position
        return 0 if log_ is None else sum(max(0, end - position.get(p, 0)) for p, end in log_.ends().items())

    @property
    def share(self) -> float:
        """How much of the room is used, from 0 on."""
        return self.bytes / self.most_bytes

    def append(
        self, events: Sequence[tuple[str, bytes]], headers: Sequence[tuple[tuple[str, bytes], ...]] | None = None
    ) -> None:
        """Durable on return. LogUnavailable where there is no room: none was taken."""
        size = sum(len(key) + len(value) + _RECORD for key, value in events)
        if self.bytes + size > self.most_bytes:
            raise LogUnavailable(
                f"the event log is away and {self.bytes >> 20} MiB of events wait in {self.folder}: no more are taken "
                f"until it is back; raise serving.forward_bytes if the disk has room"
            )
        if self._log is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = self._open(self.folder / "log")
            self._position = self._log.begins()
        self._log.append(events, headers)
        self.bytes += size

    def head(self, limit: int) -> list[LogRecord]:
        """The oldest that wait, at most `limit`, in order; what was erased meanwhile is passed over."""
        if self._log is None:
            return []
        ends = self._log.ends()
        while True:
            records = list(self._log.read(self._position, limit))
            kept = [record for record in records if record.value]
            if kept or not records:
                if not kept:
                    self._move({**self._position, **ends})
                return kept
            self.forwarded(records)

    def forwarded(self, records: Sequence[LogRecord]) -> None:
        """These, given by `head`, are safe elsewhere."""
        self._move({**self._position, **{record.partition: record.offset + 1 for record in records}})

    def _move(self, position: dict[int, int]) -> None:
        if self._log is None or position == self._position:
            return
        temporary = self.folder / "position.new"
        temporary.write_text(json.dumps(position))
        temporary.replace(self.folder / "position.json")
        self._position = position

    def records(self) -> Iterator[LogRecord]:
        """All that wait."""
        if self._log is not None:
            yield from self._log.read(dict(self._position), _LIMIT)

    def erase(self, key: str) -> int:
        """Removes a key's events -> how many."""
        return 0 if self._log is None else self._log.erase(key)

    def clear(self) -> None:
        """Removes the folder, when nothing waits; in one rename, so that a crash leaves all of it or none."""
        if self._log is None:
            return
        self._log.close()
        self._log = None
        self.folder.replace(self._done)
        shutil.rmtree(self._done, ignore_errors=True)
        self.bytes = 0

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
