"""The server's end of the deltas: a registry decides which bundle is served, a learner's deltas bring it up to date."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.components import EventLog, Scorer
from engine.errors import BundleError, EventError, LogUnavailable, PlexrankError, RequestError
from engine.streaming.deltas.announce import tell
from engine.streaming.deltas.delta import Delta
from engine.streaming.deltas.encoder_delta import apart
from engine.streaming.deltas.follower import DeltaFollower
from engine.streaming.deltas.follower_status import Applied, FollowerStatus
from engine.streaming.deltas.pointer import Pointer
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.streams import STREAMS

if TYPE_CHECKING:
    from serving.service import Service

log = logging.getLogger("plexrank.deltas")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0


def served_first(registry: ModelRegistry, bundle: Path | None) -> Path:
    """The registry's current bundle; the one that is given where nothing was promoted yet. BundleError without both."""
    pointer = registry.current()
    if pointer is not None:
        return registry.bundle(pointer.version)
    if bundle is None:
        raise BundleError(f"{registry.root}: nothing was promoted yet; name a bundle to begin with")
    return bundle


class _Appliers:
    """The scorer as a follower sees it: the retrieval encoder's part of a delta goes to what finds candidates."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def version(self) -> str:
        return self._service.scorer.version

    def load(self, bundle: Path) -> None:
        self._service.serve(bundle)

    def apply(self, delta: Delta) -> None:
        ranking, encoder = apart(delta)
        self._service.scorer.apply(ranking)
        if encoder.tables or encoder.dense or encoder.vectors is not None:
            try:
                self._service.items.take_encoder(encoder)
            except BundleError as error:
                log.warning("delta %s: its part for retrieval is left out: %s", delta.version, error)


class Following:
    """Follows the registry and the deltas from `start` to `close`. A log that is away is waited for."""

    def __init__(
        self,
        service: Service,
        registry: ModelRegistry,
        on_swap: Callable[[], object],
        on_applied: Callable[[Applied], object],
    ) -> None:
        """on_swap: called after another bundle serves; on_applied: after a delta was taken."""
        self.service, self.registry = service, registry
        self._on_swap, self._on_applied = on_swap, on_applied
        self._stop = threading.Event()
        self._follower: DeltaFollower | None = None
        self._streams: list[EventLog] = []
        self._trouble = "the event log is not open yet"
        self._thread = threading.Thread(target=self._begin, name="plexrank-following", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _begin(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                deltas, models = self._stream("deltas"), self._stream("models")
            except PlexrankError as error:
                if self._trouble != str(error):
                    self._trouble = str(error)
                    log.warning("deltas are not followed yet: %s", error)
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            scorer = cast("Scorer", _Appliers(self.service))
            follower = DeltaFollower(deltas, models, self.registry, scorer, self._swap, self._on_applied)
            self._follower = follower.start()
            return

    def _stream(self, name: str) -> EventLog:
        """Of the log; those opened so far are closed where one fails."""
        try:
            opened = self.service.log.sibling(name, **STREAMS[name])
        except PlexrankError:
            while self._streams:
                self._streams.pop().close()
            raise
        self._streams.append(opened)
        return opened

    def _swap(self, bundle: Path) -> None:
        self.service.serve(bundle)
        self._on_swap()

    def status(self) -> FollowerStatus | None:
        """None until the log is open."""
        return None if self._follower is None else self._follower.status()

    @property
    def trouble(self) -> str | None:
        """Why deltas are not followed at the moment."""
        return self._trouble if self._follower is None else self._follower.status().trouble

    # ------------------------------------------------------------------------------------------- by hand
    def promote(self, version: str, reason: str) -> Pointer:
        """RequestError: 404 for a version that is not there."""
        if all(known.version != version for known in self.registry.versions()):
            raise RequestError(f"the registry has no version '{version}'", status=404, pointer="/version")
        return self._told(self.registry.promote(version, reason=reason))

    def rollback(self, to: str | None, reason: str) -> Pointer:
        """To the version before, or to one by name. RequestError: 409 where there is none to go to."""
        if to is not None and all(known.version != to for known in self.registry.versions()):
            raise RequestError(f"the registry has no version '{to}'", status=404, pointer="/to")
        return self._told(self._of_current(lambda: self.registry.rollback(to, reason=reason)))

    def pin(self, reason: str) -> Pointer:
        """RequestError: 409 where nothing is current."""
        return self._told(self._of_current(lambda: self.registry.pin(reason=reason)))

    def unpin(self, reason: str) -> Pointer:
        """As `pin`."""
        return self._told(self._of_current(lambda: self.registry.unpin(reason=reason)))

    def _of_current(self, change: Callable[[], Pointer]) -> Pointer:
        try:
            return change()
        except BundleError as error:
            raise RequestError(str(error), status=409) from None

    def _told(self, pointer: Pointer) -> Pointer:
        """The log hears of it too; where it cannot, the registry alone says it, and a learner passes it on later."""
        try:
            if self.service.waits:
                raise LogUnavailable("the event log is away")
            tell(self.service.log, pointer)
        except EventError as error:
            log.info("the stream `models` was not told of %s: %s", pointer.version, error)
        return pointer

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)
        if self._follower is not None:
            self._follower.stop()
        for stream in self._streams:
            stream.close()
