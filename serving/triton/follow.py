"""Beside a Triton: promoted bundles become its next versions, a learner's deltas reach the memory it scores from."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from engine.bundle import Bundle
from engine.components import EventLog, Scorer
from engine.config import ComponentConfig
from engine.config_triton import TritonConfig
from engine.errors import PlexrankError
from engine.plugins import Plugins, installed
from engine.streaming.deltas.follower import DeltaFollower
from engine.streaming.deltas.follower_status import Applied
from engine.streaming.deltas.pointer import Pointer
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.open_log import open_log
from engine.streaming.events.streams import STREAMS
from serving.triton.client import TritonClient
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.follow_status import SECONDS, FollowStatus
from serving.triton.layout import CONFIG, live_root
from serving.triton.target import TritonTarget

log = logging.getLogger("plexrank.triton")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0

T = TypeVar("T")


class Following:
    """`run` waits for a registry, an event log and a Triton that are not there yet, then follows until `stop`."""

    def __init__(
        self,
        repository: Path,
        registry: ModelRegistry,
        client: TritonClient,
        state_dir: Path,
        *,
        name: str | None = None,
        event_log: ComponentConfig | None = None,
        given: Mapping[str, Any] | None = None,
        stated: TritonConfig | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        """name: of the model in Triton, by default the registry's. event_log: by default that of the first bundle that
        is served; state_dir: of its server, where the log is in a folder of it. given, stated: as `export.Wish`."""
        self.repository, self.registry, self.client, self.state_dir = repository, registry, client, state_dir
        self._name, self._event_log, self._given, self._stated = name, event_log, given, stated
        self._plugins = plugins if plugins is not None else installed()
        self._stop = threading.Event()
        self._target: TritonTarget | None = None
        self._follower: DeltaFollower | None = None
        self._streams: list[EventLog] = []
        self._trouble: str | None = None
        self._rows, self._newest = 0, math.nan

    def stop(self) -> None:
        """From a signal or another thread: `run` ends soon."""
        self._stop.set()

    def run(self) -> None:
        """PlexrankError naming the process that follows this model already."""
        try:
            pointer = self._waited(f"{self.registry.root}: nothing was promoted yet", self.registry.current)
            if pointer is None:
                return
            model = self._name or pointer.model
            self._target = target = TritonTarget(
                self.repository, model, self.client, self._plugins, self._given, self._stated
            )
            if self._waited("nothing is served yet", self._served) is None:
                return
            streams = self._waited("the event log is not open yet", lambda: self._opened(pointer))
            if streams is None:
                return
            follower = DeltaFollower(*streams, self.registry, cast("Scorer", target), self._swap, self._applied)
            self._follower = follower.start()
            while not self._stop.wait(SECONDS):
                self._say()
        finally:
            self._close()

    # ---------------------------------------------------------------------------------------------- beginning
    def _waited(self, without: str, look: Callable[[], T | None]) -> T | None:
        """What `look` gives once it gives something; None where the end came first. without: the trouble until then."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                found = look()
                if found is not None:
                    self._trouble = None
                    return found
                trouble = without
            except PlexrankError as error:
                trouble = str(error)
            if trouble != self._trouble:
                log.warning("waiting: %s", trouble)
            self._trouble = trouble
            self._say()
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return None

    def _served(self) -> bool:
        """That a version is there, deployed if need be: answers do not wait for a log that is away."""
        assert self._target is not None
        if self._target.number is None:
            self._swap(self.registry.bundle("current"))
        return True

    def _opened(self, pointer: Pointer) -> tuple[EventLog, EventLog]:
        """The streams of deltas and of pointers."""
        use = self._event_log
        if use is None:
            use = Bundle.open(self.registry.bundle(pointer.version), verify=False).config.serving.event_log
        try:
            events = open_log(self._plugins, use, self.state_dir, read_only=True)
            self._streams.append(events)
            for name in ("deltas", "models"):
                self._streams.append(events.sibling(name, **STREAMS[name]))
        except PlexrankError:
            self._close_streams()
            raise
        return self._streams[1], self._streams[2]

    # ---------------------------------------------------------------------------------------------- following
    def _swap(self, bundle: Path) -> None:
        assert self._target is not None
        self._target.load(bundle)
        self._newest = math.nan
        log.info("%s: version %s scores with %s", self._target.model, self._target.number, self._target.version)

    def _applied(self, applied: Applied) -> None:
        self._rows += applied.rows
        if not math.isnan(applied.newest):
            self._newest = applied.newest
        log.debug("delta %s: %d rows in %.1f ms", applied.version, applied.rows, 1e3 * applied.seconds)

    def status(self) -> FollowStatus | None:
        """None while it is not known which model is followed."""
        target, follower = self._target, self._follower
        its = None if follower is None else follower.status()
        model = self._name if target is None else target.model
        if model is None:
            return None
        version = None
        if target is not None:
            with suppress(PlexrankError):
                version = target.version
        return FollowStatus(
            model=model,
            number=None if target is None else target.number,
            version=version,
            newest=None if math.isnan(self._newest) else self._newest,
            rows=self._rows,
            trouble=self._trouble if its is None else its.trouble,
            last_error=None if its is None else its.last_error,
            lag_seconds=0.0 if its is None else its.lag_seconds,
            applied=0 if its is None else its.applied,
            swaps=0 if its is None else its.swaps,
            gaps=0 if its is None else its.gaps,
            errors=0 if its is None else its.errors,
        )

    def _say(self) -> None:
        """Into the live folder, as far as there is one."""
        status = self.status()
        if self._target is not None:
            self._target.beat()
        if status is None:
            return
        try:
            config = self.repository / status.model / CONFIG
            stated = ModelConfig.read(config).settings.live if config.exists() else ""
            status.write(live_root(self.repository, stated))
        except (OSError, PlexrankError) as error:
            log.debug("the status cannot be written: %s", error)

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.stop()
        self._say()
        if self._target is not None:
            self._target.close()
        self._close_streams()

    def _close_streams(self) -> None:
        while self._streams:
            self._streams.pop().close()
