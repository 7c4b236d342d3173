"""A server's way in: follows the pointer and the deltas of one model, and comes back from whatever it missed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.components.logs import EventLog, LogReader, LogRecord
from engine.components.serving import Scorer
from engine.errors import BundleError, DeltaGap, EventError, LogGap, PlexrankError
from engine.files import sha256
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, parsed, standing
from engine.streaming.deltas.delta_codec import read_header
from engine.streaming.deltas.delta_files import DeltaFiles
from engine.streaming.deltas.follower_status import Applied, FollowerStatus
from engine.streaming.deltas.pointer import Pointer
from engine.streaming.deltas.pointer_watch import PointerWatch
from engine.streaming.deltas.registry import ModelRegistry

log = logging.getLogger("plexrank.deltas")

RECORDS = 16
"""Records taken from the log at once: each may be 900 KB."""
WAIT_SECONDS = 0.1
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
SHORTEST_RETRY, LONGEST_RETRY = 0.5, 60.0


@dataclass(frozen=True)
class _Gap:
    """What could not be reached: (epoch, sequence) of the delta behind it, when it is tried again, the pause then."""

    place: tuple[int, int]
    why: str
    again: float
    pause: float


class DeltaFollower:
    """A thread that keeps a scorer at the newest version; what goes wrong is counted and tried again, never raised.

    Where the pointer names another bundle, or its epoch says that the chain was left, the bundle is loaded; then the
    deltas behind it are applied, from the files and from the log. Where one is missing or damaged, the files are asked,
    then the chain is read again from where it begins; a scorer that refuses what should follow gets the bundle anew.
    Where nothing closes the gap, the scorer stays at the last version that was whole until the pointer changes.
    """

    def __init__(
        self,
        deltas: EventLog,
        models: EventLog | None,
        registry: ModelRegistry,
        scorer: Scorer,
        on_swap: Callable[[Path], object] | None = None,
        on_applied: Callable[[Applied], object] | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        """on_swap: loads a bundle where a server does more than `scorer.load`; scorer.version is the bundle's then.

        folder: of the delta files; `deltas` beside the versions where None.
        """
        self.deltas, self.registry, self.scorer = deltas, registry, scorer
        self._folder = folder
        self._swap_in = on_swap if on_swap is not None else scorer.load
        self._on_applied = on_applied
        self._watch = PointerWatch(registry, models)
        self._pointer: Pointer | None = None
        self._to_load = False  # the pointer's bundle is not in yet
        self._epoch = 0  # of the chain that is followed: the pointer's, or a later one from the same bundle
        self._reader: LogReader | None = None
        self._positions: dict[int, int] | None = None  # behind the last record that was taken; None: from the beginning
        self._passed: dict[int, int] | None = None  # the first record that only another pointer could make use of
        self._assembler = Assembler()
        self._gap: _Gap | None = None
        self._counts = dict.fromkeys(("applied", "known", "stale", "gaps", "swaps", "errors"), 0)
        self._last_error: str | None = None
        self._trouble: str | None = None
        self._newest_applied = 0.0
        self._waits = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plexrank-deltas", daemon=True)

    def start(self) -> DeltaFollower:
        self._watch.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the threads; the scorer goes on with what it has."""
        self._stop.set()
        self._watch.stop()
        if self._thread.is_alive():
            self._thread.join(30)

    def status(self) -> FollowerStatus:
        pointer, version, gap = self._pointer, self._version(), self._gap
        epoch, sequence = parsed(version)[1:] if version is not None else (0, 0)
        return FollowerStatus(
            model=pointer.model if pointer is not None else None,
            version=version,
            epoch=epoch if sequence else self._epoch,
            sequence=sequence,
            pinned=pointer is not None and pointer.pinned,
            lag_seconds=max(0.0, time.time() - self._newest_applied) if self._waits and self._newest_applied else 0.0,
            last_error=self._last_error,
            trouble=self._trouble or (gap.why if gap is not None else None) or self._watch.trouble,
            **self._counts,
        )

    # ---------------------------------------------------------------------------------------------- the loop
    def _run(self) -> None:
        pause = SHORTEST_PAUSE
        while not self._stop.is_set():
            try:
                self._follow_pointer()
                self._follow_log()
                pause, self._trouble = SHORTEST_PAUSE, None
            except Exception as error:
                self._note(error)
                self._trouble = str(error)
                self._close_reader()
                self._stop.wait(SHORTEST_PAUSE)
                self._watch.changed.wait(pause - SHORTEST_PAUSE)
                pause = min(2 * pause, LONGEST_PAUSE)
        self._close_reader()

    def _follow_pointer(self) -> None:
        """Loads the pointer's bundle where another, or a chain that was left, is served; raises if it cannot be."""
        if self._watch.changed.is_set() or self._pointer is None:
            self._watch.changed.clear()
            pointer = self._watch.look()
            if pointer is not None and pointer != self._pointer:
                self._turn_to(pointer)
        pointer = self._pointer
        if pointer is not None and (self._to_load or parsed(self._version() or "")[0] != pointer.version):
            self._load(pointer)
            self._catch_up()

    def _turn_to(self, pointer: Pointer) -> None:
        old, self._pointer, self._gap = self._pointer, pointer, None
        base, epoch, sequence = parsed(self._version() or "")
        left = sequence > 0 and (epoch < pointer.epoch or pointer.pinned)
        self._to_load = base != pointer.version or left
        self._epoch = pointer.epoch if self._to_load or sequence == 0 else epoch
        if old is None or self._start() is not None or self._passed is not None:
            self._begin_at(self._start() or self._passed)
        if not self._to_load:
            self._catch_up()

    def _load(self, pointer: Pointer) -> None:
        self._to_load = True
        path = self.registry.bundle(pointer.version)
        if sha256(path / "manifest.json") != pointer.sha256:
            raise BundleError(f"{path}: its manifest is not the one that was published; copy the bundle again")
        self._swap_in(path)
        self._to_load = False
        self._counts["swaps"] += 1

    def _follow_log(self) -> None:
        """Takes the next records."""
        if self._pointer is None:
            self._watch.changed.wait(WAIT_SECONDS)
            return
        if self._gap is not None and time.monotonic() >= self._gap.again:
            self._catch_up()
            self._read_again(self._gap)
        try:
            if self._reader is None:
                self._reader = self.deltas.reader(self.deltas.begins() if self._positions is None else self._positions)
            records = self._reader.poll(RECORDS, WAIT_SECONDS)
        except LogGap as error:
            self._counts["gaps"] += 1
            self._note(error)
            self._catch_up()
            self._begin_at(None)
            return
        except EventError:
            self._catch_up()
            raise
        reader = self._reader
        for record in records:
            self._look_ahead(record)
            if self._stop.is_set() or self._watch.changed.is_set():
                break
            self._positions = {**(self._positions or {}), record.partition: record.offset + 1}
            self._take(record)
            if self._reader is not reader:  # it was sent back
                return
        else:
            self._positions = dict(reader.positions)
            self._waits = any(reader.lag().values())
            return
        self._close_reader()

    def _look_ahead(self, record: LogRecord) -> None:
        """A delta of a later epoch, from another bundle, was published behind a pointer that is not known yet."""
        pointer = self._pointer
        try:
            header = read_header(record.value)
        except BundleError:
            return
        if pointer is None or header.model != pointer.model or header.epoch < self._epoch:
            return
        other = header.base != pointer.version
        if other and header.epoch > self._epoch:
            self._watch.look()
        if self._passed is None and (other or pointer.pinned):
            self._passed = {**(self._positions or {}), record.partition: record.offset}

    def _take(self, record: LogRecord) -> None:
        """One part of a delta; what is wrong with it is counted."""
        pointer = self._pointer
        if pointer is None or record.key != pointer.model or not record.value:
            return
        try:
            header = read_header(record.value)
            if header.base != pointer.version or header.epoch < self._epoch or pointer.pinned:
                self._counts["stale"] += header.part == 0
                return
            _, epoch, sequence = parsed(self.scorer.version)
            if header.epoch == epoch and header.sequence <= sequence:
                self._counts["known"] += header.part == 0
                return
            delta = self._assembler.add(record.value)
        except BundleError as error:
            self._note(error)
            self._catch_up()
            return
        if delta is not None:
            self._offer(delta, self._assembler.size)

    def _offer(self, delta: Delta, size: int) -> None:
        """Applies a delta of the chain that is followed, or of a later one from the same bundle; closes a gap first."""
        self._turn_to_epoch(delta.epoch)
        if standing(delta, self.scorer.version) == "gap":
            self._catch_up()
        where = standing(delta, self.scorer.version)
        if where == "next":
            self._apply(delta, size)
        elif where == "gap":
            self._retry(delta, f"delta {delta.version} does not follow {self.scorer.version}", load=False)

    def _apply(self, delta: Delta, size: int) -> None:
        start = time.perf_counter()
        try:
            self.scorer.apply(delta)
        except PlexrankError as error:
            self._note(error)
            self._retry(delta, str(error), load=isinstance(error, DeltaGap))
            return
        seconds = time.perf_counter() - start
        self._counts["applied"] += 1
        self._newest_applied = delta.created
        if self._gap is not None and (delta.epoch, delta.sequence) >= self._gap.place:
            self._gap = None
        if self._on_applied is not None:
            try:
                self._on_applied(Applied(delta.version, size, delta.row_count, seconds, delta.created, delta.newest))
            except Exception as error:
                self._note(error)

    # ---------------------------------------------------------------------------------------------- gaps
    def _turn_to_epoch(self, epoch: int) -> None:
        """A chain that was begun anew from the same bundle: back to the bundle, if another chain's deltas are in."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        if parsed(self.scorer.version)[2] > 0 and self._pointer is not None:
            self._load(self._pointer)

    def _catch_up(self) -> None:
        """Applies what the files hold behind the scorer's version."""
        pointer = self._pointer
        if pointer is None or pointer.pinned or self._to_load:
            return
        try:
            folder = self._folder if self._folder is not None else self.registry.folder / "deltas"
            files = DeltaFiles(folder)
            self._turn_to_epoch(max(self._epoch, files.newest_epoch(pointer.version)))
            for delta, size in files.after(pointer.version, self._epoch, parsed(self.scorer.version)[2]):
                before = self.scorer.version
                self._apply(delta, size)
                if self.scorer.version == before or self._stop.is_set():
                    return
        except (OSError, PlexrankError) as error:
            self._note(error)

    def _retry(self, delta: Delta, why: str, *, load: bool) -> None:
        """Reads the chain again from where it begins, at growing intervals while this delta is not reached.

        load: the bundle first, because the scorer refused what should have followed.
        """
        if self._gap is not None and time.monotonic() < self._gap.again:
            return
        self._counts["gaps"] += 1
        log.warning("%s: its chain is read again", why)
        if load and self._pointer is not None:
            self._load(self._pointer)
        pause = SHORTEST_RETRY if self._gap is None else self._gap.pause
        self._read_again(_Gap((delta.epoch, delta.sequence), why, 0.0, pause))

    def _read_again(self, gap: _Gap) -> None:
        self._gap = replace(gap, again=time.monotonic() + gap.pause, pause=min(2 * gap.pause, LONGEST_RETRY))
        self._begin_at(self._start())

    # ---------------------------------------------------------------------------------------------- helpers
    def _begin_at(self, positions: Mapping[int, int] | None) -> None:
        """The next records come from there (None: from the log's beginning)."""
        self._close_reader()
        self._positions, self._passed = None if positions is None else dict(positions), None
        self._assembler = Assembler()

    def _start(self) -> Mapping[int, int] | None:
        """Where the pointer's chain begins in the log, as far as it says."""
        pointer = self._pointer
        known = pointer is not None and pointer.positions and pointer.stream == self.deltas.identity
        return pointer.positions if pointer is not None and known else None

    def _close_reader(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.close()

    def _version(self) -> str | None:
        """Of what scores; None where nothing is loaded."""
        try:
            return self.scorer.version
        except PlexrankError:
            return None

    def _note(self, error: Exception) -> None:
        self._counts["errors"] += 1
        text = str(error) or type(error).__name__
        if text != self._last_error:
            log.warning("the follower goes on after: %s", text)
        self._last_error = text
