"""A reader of the log in a folder, in the process that writes it or in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from engine.components import LogReader, LogRecord
from engine.errors import EventError
from plugins.events.partition import Partition
from plugins.events.tail import Tail

LOOK_SECONDS = 0.005  # between two looks at what another process has written


class Growth:
    """Lets readers wait until this process has appended something."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def note(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, seen: int, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.count != seen, timeout)


class LocalReader(LogReader):
    """Tails partitions; each poll begins with the one after that which the last poll ended with."""

    def __init__(self, partitions: Sequence[Partition], positions: Mapping[int, int], growth: Growth) -> None:
        self._partitions = partitions
        self._growth = growth
        self._tails: dict[int, Tail] = {}
        self._paused: set[int] = set()
        self._turn = 0
        self.seek(positions)

    def poll(self, limit: int = 1000, timeout: float = 0.1) -> list[LogRecord]:
        """Sleeps until this process appends; looks every 5 ms where another one writes."""
        until = time.monotonic() + timeout
        while True:
            seen = self._growth.count
            taken = self._take(limit)
            left = until - time.monotonic()
            if taken or left <= 0:
                return taken
            here = all(self._partitions[number].writes for number in self._tails)
            self._growth.wait(seen, left if here else min(left, LOOK_SECONDS))

    def _take(self, limit: int) -> list[LogRecord]:
        numbers = [number for number in self._tails if number not in self._paused]
        taken: list[LogRecord] = []
        for step in range(len(numbers)):
            number = numbers[(self._turn + step) % len(numbers)]
            taken += self._tails[number].take(limit - len(taken))
            if len(taken) >= limit:
                self._turn += step + 1
                break
        return taken

    @property
    def positions(self) -> dict[int, int]:
        return {number: tail.offset for number, tail in self._tails.items()}

    def seek(self, positions: Mapping[int, int]) -> None:
        for number, offset in positions.items():
            if not 0 <= number < len(self._partitions):
                raise EventError(f"there is no partition {number}; the log has {len(self._partitions)}")
            self._tails[number] = Tail(self._partitions[number], offset)

    def lag(self) -> dict[int, int]:
        return {number: max(0, self._partitions[number].end - tail.offset) for number, tail in self._tails.items()}

    def pause(self, partitions: Sequence[int]) -> None:
        self._paused.update(partitions)

    def resume(self, partitions: Sequence[int]) -> None:
        self._paused.difference_update(partitions)

    def close(self) -> None:
        self._tails.clear()
