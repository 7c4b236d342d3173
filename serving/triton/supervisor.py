"""Keeps a Triton serving: starts it, proves that it answers, brings back what died, ends it without a trace."""

from __future__ import annotations

import copy
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import PlexrankError
from serving.child import Child
from serving.triton import shm
from serving.triton.client import CONTROL, TritonError
from serving.triton.launcher import Launch, Ports, ServerProcess, is_open
from serving.triton.probe import Prober
from serving.triton.repository import find_models
from serving.triton.state import Identity, State, only_one
from serving.triton.stubs import end_all
from serving.triton.wheel import Wheel, find_wheel

log = logging.getLogger("plexrank.triton")

FOLLOW_LOG = "follow.log"
_LONGEST = 10.0
_WELL = 60.0
"""Seconds without a fault after which the server's earlier ends count no more."""
_LEFT = 6.0
"""Seconds more for what a killed supervisor has left, which was told to end when its parent did."""
_WORDS = 600
"""Characters of Triton's reason for a refusal; its start and its end say most."""


@dataclass(frozen=True)
class Settings:
    """What `plexrank triton up` is told. Ports: 0 for any free one; timeout: seconds until all must be ready.

    models, config, state_dir: what the process beside the server follows.
    """

    repository: Path
    folder: Path
    wheel: Path | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    timeout: float = 180.0
    threads: int = 1
    models: Path | None = None
    config: Path | None = None
    state_dir: Path = Path("state")
    every: float = 1.0
    silence: float = 10.0
    tries: int = 5
    backoff: float = 0.2

    def follow_command(self, url: str) -> list[str]:
        """What runs beside the server: it brings promoted bundles and a learner's deltas."""
        command = [sys.executable, "-P", "-m", "engine", "triton", "follow", str(self.repository.resolve())]
        command += ["--models", str(self.models), "--url", url, "--state-dir", str(self.state_dir)]
        return command + (["--config", str(self.config)] if self.config else [])


class Supervisor:
    """One server with its models. `run` from the main thread: the kernel ends the server with that thread."""

    def __init__(self, settings: Settings, told: Callable[[State], None] = lambda state: None) -> None:
        """told: called once, when models answer."""
        self.settings, self._told = settings, told
        self._stopping = threading.Event()
        self._server: ServerProcess | None = None
        self._follower: Child | None = None
        self._followed = 0.0
        self._ends = 0
        self._well_since = self._answered = time.monotonic()
        self._written: State | None = None

    def run(self) -> None:
        """Until SIGTERM, SIGINT or SIGHUP. PlexrankError where it cannot start, or gives up."""
        with only_one(self.settings.folder), self._signals():
            _clear_leftovers(self.settings.folder)
            launch = self._checked()
            self.state = State(
                phase="starting",
                supervisor=_this_process(),
                repository=str(launch.repository),
                url=launch.url,
                ports={"http": launch.ports.http, "grpc": launch.ports.grpc, "metrics": launch.ports.metrics},
                prefix=launch.prefix,
                wheel=str(launch.wheel.folder),
                control=launch.control,
            )
            try:
                self._start(launch)
                if not self._stopping.is_set():
                    self._told(self.state)
                    self._watch(launch)
                self._end("stopped")
            except PlexrankError as error:
                if self._stopping.is_set():  # what fails while it ends is no fault
                    self._end("stopped")
                    return
                self._end("failed", str(error))
                raise
            except BaseException as error:
                self._end("failed", f"unexpected {type(error).__name__}: {error}")
                raise

    def _checked(self) -> Launch:
        """What can be known before the server starts."""
        wanted = self.settings
        if wanted.models is not None:
            _made(wanted.repository)
        models = find_models(wanted.repository)
        if not models and wanted.models is None:
            raise PlexrankError(
                f"{wanted.repository}: holds no model; run: plexrank export triton BUNDLE {wanted.repository}"
            )
        wheel = find_wheel(wanted.wheel)
        ports = Ports.chosen(wanted.host, wanted.http_port, wanted.grpc_port, wanted.metrics_port)
        given = os.environ.get(CONTROL, "")
        control = given or secrets.token_urlsafe(24)
        guarded = bool(given) or is_open(wanted.host)
        return Launch(
            Wheel(wheel.folder.resolve()),
            wanted.repository.resolve(),
            wanted.folder.resolve(),
            wanted.host,
            ports,
            control,
            guarded,
            wanted.threads,
        )

    def _start(self, launch: Launch) -> None:
        """Until models answer. PlexrankError where none does, and the server is gone again."""
        until = time.monotonic() + self.settings.timeout
        self._require_room()
        self._server = server = ServerProcess(launch)
        self.state.server = server.identity
        self._write()
        try:
            server.wait_live(self.settings.timeout, self._stopping.is_set)
            refused = self._load(server, until)
            self._prober = Prober(server.client, server.stubs, self.state)
            self._prober.look(max(1.0, until - time.monotonic()), first=True)
            self._refuse_wrong(server)
            self.state.faults |= refused
            answering = [m for m, vs in self.state.models.items() if any(v.ready for v in vs.values())]
            if not answering and (self.state.faults or self.settings.models is None):
                raise PlexrankError("no model answers: " + "; ".join(f"{m}: {f}" for m, f in self.state.faults.items()))
        except PlexrankError:
            server.kill()
            raise
        self._answered = self._well_since = time.monotonic()
        self.state.phase = "ready"
        self._write()

    def _require_room(self) -> None:
        instances = 0
        for folder in find_models(self.settings.repository):
            try:
                instances += folder.instances()
            except PlexrankError as error:
                log.error("%s", error)
        shm.require_room(instances)

    def _load(self, server: ServerProcess, until: float) -> dict[str, str]:
        """All models, one after the other -> those that Triton refuses, with its reason."""
        refused: dict[str, str] = {}
        for folder in find_models(self.settings.repository):
            try:
                folder.instances()
                server.client.load(folder.name, timeout=max(1.0, until - time.monotonic()))
            except PlexrankError as error:
                if server.ended:
                    raise PlexrankError(
                        f"tritonserver ended with {server.ended} while it loaded {folder.name}: {server.last_words()}"
                    ) from error
                refused[folder.name] = _reason(error)
                log.error("%s does not load: %s", folder.name, refused[folder.name])
                self.state.fault(f"{folder.name} does not load: {refused[folder.name]}")
        return refused

    def _refuse_wrong(self, server: ServerProcess) -> None:
        """Unloads models whose newest version answers wrongly: no answer is better than a wrong one."""
        for model, versions in list(self.state.models.items()):
            newest = versions[max(versions, key=int)]
            if not newest.ready:
                log.error("%s is unloaded: %s", model, newest.fault)
                server.client.unload(model)
                self.state.faults[model] = newest.fault
                del self.state.models[model]

    def _watch(self, launch: Launch) -> None:
        """Looks about every second until told to end."""
        while not self._stopping.is_set():
            server = self._server
            assert server is not None
            if server.ended:
                self._restart(launch, f"tritonserver ended with {server.ended}: {server.last_words()}")
            else:
                try:
                    self._prober.look()
                    self._answered = time.monotonic()
                except TritonError as error:
                    if time.monotonic() - self._answered > self.settings.silence and not self._stopping.is_set():
                        server.kill()
                        self._restart(launch, f"tritonserver was silent for {self.settings.silence:.0f} s: {error}")
            if self._ends and time.monotonic() - self._well_since > _WELL:
                self._ends = 0
            self._follow(launch)
            self._write()
            self._stopping.wait(self.settings.every)

    def _restart(self, launch: Launch, why: str) -> None:
        """Starts the server again, later and later; PlexrankError after so many ends in a row."""
        while not self._stopping.is_set():
            self._ends += 1
            self.state.fault(why)
            log.error("%s", why)
            if self._ends >= self.settings.tries:
                raise PlexrankError(
                    f"gave up: tritonserver ended {self._ends} times in a row; the last time: {why} "
                    f"(logs in {self.settings.folder}; run plexrank triton up again when that is mended)"
                )
            self.state.phase = "restarting"
            self._write()
            if self._server is not None:
                self._server.kill()
            if self._stopping.wait(min(_LONGEST, self.settings.backoff * 2 ** (self._ends - 1))):
                return
            try:
                self._start(launch)
            except PlexrankError as error:
                why = str(error)
                continue
            self.state.restarts += 1
            log.warning("tritonserver serves again")
            return

    def _follow(self, launch: Launch) -> None:
        """Starts the follower, and again where it ended, ten seconds after the last time."""
        if self.settings.models is None or (self._follower is not None and self._follower.ended is None):
            return
        if self._follower is not None:
            if time.monotonic() - self._followed < _LONGEST:
                return
            said = self._follower.last_words() or "it said nothing"
            fault = f"the follower ended with {self._follower.ending}: {said}"
            log.error("%s", fault)
            self.state.fault(fault)
        words = self.settings.folder / FOLLOW_LOG
        if words.exists():
            words.replace(words.with_suffix(".log.1"))
        environment = {**os.environ, CONTROL: launch.control}
        command = self.settings.follow_command(launch.url)
        self._follower = Child(command, words, environment, at_parents_end=signal.SIGTERM)
        self._followed = time.monotonic()
        self.state.follower = Identity.of(self._follower.pid)

    def _end(self, phase: str, reason: str = "") -> None:
        """The follower first, then the server; nothing of them stays but what they logged."""
        self.state.phase = "stopping"
        self._write()
        if self._follower is not None:
            self._follower.stop()
        if self._server is not None:
            self._server.stop()
        self.state.phase = phase  # type: ignore[assignment]
        self.state.reason = reason
        self.state.server = self.state.follower = None
        self.state.models = {}
        self._write()

    def _write(self) -> None:
        if self.state != self._written:
            self.state.write(self.settings.folder)
            self._written = copy.deepcopy(self.state)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """A signal also reaches the server at once: this thread may be waiting for it.

        While it loads its first models nobody is served, and it would not end before they are loaded: it is killed.
        """

        def stop(*_: object) -> None:
            self._stopping.set()
            if self._server is not None:
                self._server.terminate(signal.SIGTERM if self.state.phase == "ready" else signal.SIGKILL)

        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in names}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _clear_leftovers(folder: Path) -> None:
    """Ends what a supervisor that was killed has left, and removes its shared memory."""
    held = State.read(folder)
    if held is not None:
        for left in filter(None, (held.follower, held.server)):
            if left.alive:
                log.warning("process %d is left of an earlier run: it is ended", left.pid)
                left.end(_LEFT)
        end_all(held.prefix)
        shm.clear(held.prefix)


def _made(repository: Path) -> None:
    """The folder, which the follower fills. PlexrankError where it cannot be made."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlexrankError(f"{repository}: cannot be made: {error.strerror}") from error


def _this_process() -> Identity:
    found = Identity.of(os.getpid())
    assert found is not None
    return found


def _reason(error: PlexrankError) -> str:
    """On one line, not too long; a full /dev/shm with its remedy."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _WORDS else f"{text[: _WORDS // 2]} ... {text[-_WORDS // 2 :]}"
    if "shared memory" in text:
        text += f" (is {shm.FOLDER} full? see df {shm.FOLDER})"
    return text
