"""Where a follower finds what is served: the pointer in the registry or on the stream `models`, whichever is newer."""

from __future__ import annotations

import threading

from engine.components.logs import EventLog, LogReader
from engine.errors import BundleError, EventError, LogGap
from engine.streaming.deltas.pointer import Pointer, decode_pointer
from engine.streaming.deltas.registry import ModelRegistry

LOOK_SECONDS = 0.2
"""Time between two looks at the registry: a rollback by hand is followed within a second."""


class PointerWatch:
    """A thread that looks for another pointer and sets `changed`; `latest` is the newest that it knows.

    The registry's file may be seen late (another machine's mount): a pointer of the same registry on the stream counts
    where it was set later. A stream that tells of another registry is passed over. A replica that has the versions but
    not that file follows the stream. trouble: why neither could be read at the last look, or None.
    """

    def __init__(self, registry: ModelRegistry, models: EventLog | None) -> None:
        self.registry, self.models = registry, models
        self.changed = threading.Event()
        self.latest: Pointer | None = None
        self.trouble: str | None = None
        self._reader: LogReader | None = None
        self._told: Pointer | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="plexrank-pointer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> Pointer | None:
        """The newest pointer as it is now; where neither says one, the latest known."""
        with self._lock:
            try:
                found = self.registry.current()
                self.trouble = None
            except BundleError as error:
                found, self.trouble = None, str(error)
            told = self._told
            if told is not None and (found is None or told.follows(found)):
                found = told
            if found is not None and found != self.latest:
                self.latest = found
                self.changed.set()
            return self.latest

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._hear()
        if self._reader is not None:
            self._reader.close()

    def _hear(self) -> None:
        """Waits for a record on `models`, at most until the next look."""
        if self.models is None:
            self._stop.wait(LOOK_SECONDS)
            return
        try:
            if self._reader is None:
                self._reader = self.models.reader(self.models.begins())
            records = self._reader.poll(1000, LOOK_SECONDS)
        except LogGap:
            self._close()  # compacted or begun anew: read again from its beginning
            records = []
        except EventError as error:
            self.trouble = str(error)
            self._close()
            self._stop.wait(5 * LOOK_SECONDS)
            return
        for record in records:
            if self.registry.known and record.key == self.registry.model and record.value:
                try:
                    pointer = decode_pointer(record.value, f"stream models, offset {record.offset}")
                except BundleError as error:
                    self.trouble = str(error)
                    continue
                told = self._told
                if pointer.model == record.key and not (told is not None and told.follows(pointer)):
                    self._told = pointer

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
