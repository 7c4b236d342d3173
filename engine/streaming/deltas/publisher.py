"""A learner's way out: deltas to the log and to files, bundles to the registry; what the log does not take waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.components.logs import EventLog
from engine.errors import BundleError, DeltaGap, EventError, PlexrankError
from engine.streaming.deltas.announce import announce
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, merge, standing
from engine.streaming.deltas.delta_codec import Dtype, encode, read_header
from engine.streaming.deltas.delta_files import DeltaFiles
from engine.streaming.deltas.lease import Lease
from engine.streaming.deltas.pointer import Pointer
from engine.streaming.deltas.registry import ModelRegistry

log = logging.getLogger("plexrank.learning")

LOOKED_BACK = 256
"""Newest records of the log that `reached` looks at."""
HANGS_SECONDS = 0.5
"""After an attempt that failed no sooner, a thread makes the next ones: who publishes does not wait for them."""
_RETRY_SECONDS, _DRAIN_SECONDS = 1.0, 0.1


@dataclass(frozen=True)
class Published:
    """What became of a delta. bytes: of its parts; 0 while it waits. seconds: that publishing took."""

    version: str
    rows: int
    bytes: int
    seconds: float
    waits: bool


@dataclass
class _Sealed:
    """A delta whose bytes are fixed: a part of it may be in the log."""

    delta: Delta
    parts: list[bytes]
    filed: bool = False


class DeltaPublisher:
    """Publishes the chain of one model; the second of two publishers is refused (a lease in the registry).

    Outbox: a delta that was begun to be sent keeps its bytes until the log has it; those behind it wait as one delta,
    in which each row is once, so that the outbox is bounded by the model. `pending` goes into the learner's checkpoint
    and comes back by `restore`: after a crash the same bytes are sent again, and followers ignore what they have.
    A log that hangs holds up one call for as long as its timeout; then a thread sends what waits. Safe from several
    threads.
    """

    def __init__(
        self,
        deltas: EventLog,
        models: EventLog,
        registry: ModelRegistry,
        folder: Path | None = None,
        *,
        dtype: Dtype = "float32",
        most_bytes: int = 900_000,
    ) -> None:
        """folder: of the delta files; `deltas` beside the versions where None.

        dtype, most_bytes: of the parts (`encode`).
        """
        self.deltas, self.models, self.registry = deltas, models, registry
        self._folder = folder
        self.dtype: Dtype = dtype
        self.most_bytes = most_bytes
        self.trouble: str | None = None  # why something waits
        self.gapped = False  # whether the files do not lead from the bundle to the newest delta
        self._sealed: deque[_Sealed] = deque()
        self._waiting: Delta | None = None
        self._announced: Pointer | None = None
        self._last: Delta | None = None
        self._unfiled: Delta | None = None  # what the disk did not take
        self._lease: Lease | None = None
        self._shrinking: threading.Thread | None = None
        self._sender: threading.Thread | None = None  # while there is one, it alone sends
        self._closing = threading.Event()
        self._lock = threading.RLock()
        if registry.known:
            self._own()

    @property
    def files(self) -> DeltaFiles:
        return DeltaFiles(self._folder if self._folder is not None else self.registry.folder / "deltas")

    @property
    def waiting(self) -> int:
        """Deltas that the log does not have yet; those that were merged count as one."""
        return len(self._sealed) + (self._waiting is not None)

    def publish(self, delta: Delta) -> Published:
        """Sends a delta, or keeps it where the log does not answer or the version is pinned.

        DeltaGap: the chain was left (a rollback, a promotion), or the delta does not follow the one before it: nothing
        was kept, and the learner begins anew from the current bundle. BundleError: it cannot be encoded, or another
        process publishes this model.
        """
        start = time.perf_counter()
        with self._lock:
            self._own()
            self._check_chain(delta)
            if self._sealed or self._waiting is not None or self._pinned():
                encode(delta, self.dtype, self.most_bytes)  # refuses now what could not be sent later
                self._waiting = delta if self._waiting is None else merge(self._waiting, delta)
            else:
                self._sealed.append(_Sealed(delta, encode(delta, self.dtype, self.most_bytes)))
            self._last = delta
            sent = self._send()
            return Published(
                delta.version,
                delta.row_count,
                0 if self.waiting else sent,
                time.perf_counter() - start,
                self.waiting > 0,
            )

    def flush(self) -> bool:
        """Sends what waits; whether nothing waits any more. To be called now and then while no delta is made."""
        with self._lock:
            self._own()
            self._send()
            return self.waiting == 0

    def drain(self, seconds: float) -> bool:
        """`flush` until nothing waits, for so long at most; not for what a pinned version keeps back."""
        end = time.monotonic() + seconds
        while not (done := self.flush()) and not self._pinned() and time.monotonic() < end:
            time.sleep(_DRAIN_SECONDS)
        return done

    def publish_bundle(self, path: Path, epoch: int, reason: str = "learned") -> Pointer:
        """Makes a bundle current, from which the chain (its version, `epoch`) begins; files of older chains go.

        What waits of the chain before is dropped: the bundle holds it. BundleError: pinned, an epoch that was left,
        a bundle of another model, disk full; the old pointer stays then, and so does what waits.
        """
        with self._lock:
            if self.registry.known:
                self._own()
            positions: dict[int, int] = {}
            try:
                positions = self.deltas.ends()
            except EventError as error:
                self.trouble = str(error)
            pointer = self.registry.publish(
                path, epoch, reason, positions=positions, stream=self.deltas.identity if positions else ""
            )
            self._own()
            self._sealed.clear()
            self._waiting = self._last = None
            self._unfiled, self.gapped = None, False
            self.files.prune(pointer.version, epoch)
            self._send()
            return pointer

    def pending(self) -> list[bytes]:
        """The parts of all that the log does not have yet, in order."""
        with self._lock:
            parts = [part for one in self._sealed for part in one.parts]
            return parts if self._waiting is None else parts + encode(self._waiting, self.dtype, self.most_bytes)

    def restore(self, parts: Sequence[bytes]) -> int:
        """Takes back what `pending` gave before a crash -> deltas; those of a chain that was left are dropped."""
        with self._lock:
            assembler, held = Assembler(most_bytes=1 << 62), []
            for part in parts:
                held.append(part)
                delta = assembler.add(part)
                if delta is not None:
                    if self._left(delta) is None:
                        self._sealed.append(_Sealed(delta, held))
                        self._last = delta
                    held = []
            return len(self._sealed)

    def reached(self, base: str, epoch: int) -> int:
        """The newest sequence of a chain that followers may have: a learner that comes back goes on behind it.

        Looks into the files and the log's newest records; where the log does not answer, into the files alone.
        """
        found = self.files.newest(base, epoch)
        try:
            begins = self.deltas.begins()
            start = {p: max(begins.get(p, 0), end - LOOKED_BACK) for p, end in self.deltas.ends().items()}
            for record in self.deltas.read(start, LOOKED_BACK * max(1, len(start))):
                try:
                    header = read_header(record.value)
                except BundleError:
                    continue
                if (header.base, header.epoch) == (base, epoch):
                    found = max(found, header.sequence)
        except EventError as error:
            self.trouble = str(error)
        return found

    def close(self) -> None:
        """Lets the next publisher have the model; the logs are their owner's."""
        self._closing.set()
        sender = self._sender
        if sender is not None:
            sender.join(60)
        with self._lock:
            if self._shrinking is not None:
                self._shrinking.join(60)
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    # ---------------------------------------------------------------------------------------------- helpers
    def _own(self) -> None:
        if self._lease is None:
            self._lease = Lease(self.registry.folder / ".publisher")
        self._lease.check()

    def _pinned(self) -> bool:
        pointer = self.registry.current()
        return pointer is not None and pointer.pinned

    def _left(self, delta: Delta) -> str | None:
        """Why a delta's chain is not the one that may be published now."""
        pointer = self.registry.current()
        if pointer is None:
            return f"no bundle of {delta.model} is current: publish {delta.base} first"
        if delta.model != pointer.model or delta.base != pointer.version or delta.epoch < pointer.epoch:
            return (
                f"{delta.model} {delta.version}: its chain was left; {pointer.model} {pointer.version} is current "
                f"since epoch {pointer.epoch} ({pointer.reason or 'no reason given'}): begin anew from that bundle"
            )
        return None

    def _check_chain(self, delta: Delta) -> None:
        left = self._left(delta)
        if left is not None:
            self._sealed.clear()
            self._waiting = self._last = None
            raise DeltaGap(left)
        last = self._last
        if last is not None and (last.base, last.epoch) == (delta.base, delta.epoch):
            if standing(delta, last.version) != "next":
                raise DeltaGap(
                    f"{delta.model} {delta.version} does not follow {last.version}, which was published last"
                )
        elif last is not None:
            self._sealed.clear()
            self._waiting = None

    def _send(self) -> int:
        """Sends what it can, in order -> bytes of the last delta sent; nothing where a thread sends."""
        if self._sender is not None:
            return 0
        size, start = 0, time.monotonic()
        try:
            self._announce(self._news())
            while (one := self._next()) is not None:
                self.deltas.append([(one.delta.model, part) for part in one.parts])
                self._sealed.popleft()
                size = sum(map(len, one.parts))
            self.trouble = None
        except EventError as error:
            if self.trouble is None:
                log.warning("deltas wait: %s", error)
            self.trouble = str(error)
            if time.monotonic() - start >= HANGS_SECONDS and not self._closing.is_set():
                self._sender = threading.Thread(target=self._send_on, name="plexrank-deltas", daemon=True)
                self._sender.start()
        return size

    def _send_on(self) -> None:
        """The same in a thread, until nothing waits; the lock is free while the log is asked."""
        while not self._closing.wait(_RETRY_SECONDS if self.trouble is not None else 0.0):
            try:
                with self._lock:
                    self._own()
                    pointer, one = self._news(), self._next()
                    if pointer is None and one is None:
                        self.trouble, self._sender = None, None
                        return
                self._announce(pointer)
                if one is not None:
                    self.deltas.append([(one.delta.model, part) for part in one.parts])
                with self._lock:
                    self.trouble = None
                    if one is not None and self._sealed and self._sealed[0] is one:  # else its chain was left meanwhile
                        self._sealed.popleft()
            except (PlexrankError, OSError) as error:
                self.trouble = str(error)

    def _next(self) -> _Sealed | None:
        """The delta that is to be sent now, its bytes fixed, and in a file."""
        if not self.waiting or self._pinned():
            return None
        if not self._sealed and self._waiting is not None:
            self._sealed.append(_Sealed(self._waiting, encode(self._waiting, self.dtype, self.most_bytes)))
            self._waiting = None
        self._file(self._sealed[0])
        return self._sealed[0]

    def _file(self, one: _Sealed) -> None:
        if one.filed:
            return
        one.filed = True
        delta, parts, before = one.delta, one.parts, self._unfiled
        try:
            if before is not None and (before.base, before.epoch) == (delta.base, delta.epoch):
                delta = merge(before, delta)  # the files go on without a gap once there is room again
                parts = encode(delta, self.dtype, self.most_bytes)
            self.files.write(delta, parts)
            self._unfiled = None
        except (OSError, BundleError, DeltaGap) as error:
            log.warning("%s: no file of delta %s: %s", self.files.folder, delta.version, error)
            self._unfiled = delta
        self._shrink(delta)

    def _shrink(self, delta: Delta) -> None:
        """Many files become few in a thread of their own: it takes a second, and the next delta must not wait."""
        files = self.files
        if (self._shrinking is not None and self._shrinking.is_alive()) or not files.many(delta.base, delta.epoch):
            return

        def shrink() -> None:
            try:
                files.shrink(delta.base, delta.epoch)
            except OSError as error:
                log.warning("%s: the files stay as many as they are: %s", files.folder, error)
            except BundleError as error:
                log.warning("%s: a bundle is due, as what starts late could not catch up: %s", files.folder, error)
                self.gapped = True

        self._shrinking = threading.Thread(target=shrink, name="plexrank-delta-files", daemon=True)
        self._shrinking.start()

    def _news(self) -> Pointer | None:
        """The pointer, whoever set it, where `models` does not have it."""
        pointer = self.registry.current()
        return None if pointer == self._announced else pointer

    def _announce(self, pointer: Pointer | None) -> None:
        if pointer is not None:
            announce(self.models, pointer)
            self._announced = pointer
