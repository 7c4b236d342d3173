"""What item events said, kept between starts: one JSON line an item that came or changed, the last of an item counts.

The log of events is the truth, but holds everything else too and forgets by age; this file is as large as the items
that changed. Adding to it does not sync: what a crash keeps from it is in the log, behind the place that is kept, and
`sync` comes before the place moves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from engine.events import Features

log = logging.getLogger("plexrank.items")

_SPARE = 1000
"""Lines that were replaced by later ones, beyond as many as count, before the file is written anew."""


class Said(msgspec.Struct):
    """All that is known of an item from events: values by feature, None where one was removed; seconds: when last."""

    item: str
    features: Features
    seconds: float


class ItemFile:
    """For one writer. A disk that is full is said in the log, once, and costs only what a restart would know."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = 0
        self._failed = self._unsynced = False

    def read(self) -> dict[str, Said]:
        """item -> what was said of it. A line that a crash cut off is left out."""
        found: dict[str, Said] = {}
        try:
            with self.path.open("rb") as file:
                for line in file:
                    self._lines += 1
                    try:
                        said = msgspec.json.decode(line, type=Said)
                    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                        log.warning("%s: line %d cannot be read and is left out", self.path, self._lines)
                        continue
                    found[said.item] = said
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(error)
        return found

    def write(self, news: Iterable[Said], everything: dict[str, Said]) -> None:
        """Adds `news`; writes `everything` anew where most of the file no longer counts."""
        news = list(news)
        try:
            if self._lines + len(news) > 2 * len(everything) + _SPARE:
                fresh = self.path.with_name(self.path.name + ".new")
                fresh.write_bytes(_lines(everything.values()))
                os.replace(fresh, self.path)
                self._lines = len(everything)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    # behind a line that was cut off a new one begins
                    whole = not file.tell() or _last_byte(self.path) == b"\n"
                    file.write((b"" if whole else b"\n") + _lines(news))
                self._lines += len(news)
            self._failed, self._unsynced = False, True
        except OSError as error:
            self._warn(error)

    def sync(self) -> None:
        """What was written is on the disk. OSError where it is not, or could not be written."""
        if self._failed:
            raise OSError(f"{self.path}: not all of it could be written")
        if self._unsynced:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            self._unsynced = False

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            log.warning("%s: %s: items that change are not kept between starts", self.path, error.strerror or error)
        self._failed = True


def _lines(said: Iterable[Said]) -> bytes:
    return b"".join(msgspec.json.encode(one) + b"\n" for one in said)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
