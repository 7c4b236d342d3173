"""The state folder of a launched server: one supervisor a folder, and what it writes down for other shells."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from engine.data.cache import default_cache
from engine.errors import PlexrankError
from engine.files import Held, hold, write_whole
from serving.triton.shm import PREFIX

FILE = "triton.json"
Phase = Literal["starting", "ready", "restarting", "stopping", "stopped", "failed"]


def default_state() -> Path:
    """Where `up`, `down` and `status` meet when no folder is named: `triton-server` in plexrank's cache."""
    return default_cache() / "triton-server"


@dataclass(frozen=True)
class Identity:
    """A process that is not mistaken for a later one of the same pid. start: clock ticks since the machine's start."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """None where there is no such process, or it has ended and waits to be reaped."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Identity.of(self.pid) == self

    def send(self, number: signal.Signals) -> bool:
        """A signal, to this process or to none -> whether it was sent."""
        if not self.alive:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False

    def end(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL where it is not gone in time."""
        self.send(signal.SIGTERM)
        if not wait_until(lambda: not self.alive, seconds):
            self.send(signal.SIGKILL)
            wait_until(lambda: not self.alive, seconds)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@dataclass
class VersionState:
    """One loaded version of a model, as a real inference found it last. answers: the version it said."""

    ready: bool
    tested: bool
    answers: str = ""
    seconds: float | None = field(default=None, compare=False)
    fault: str = ""


@dataclass
class State:
    """What `FILE` holds. models: model -> Triton's version -> how it is; faults: model that loads not at all -> why."""

    phase: Phase
    supervisor: Identity
    repository: str
    url: str
    ports: dict[str, int]
    prefix: str
    wheel: str
    control: str = ""
    server: Identity | None = None
    follower: Identity | None = None
    models: dict[str, dict[str, VersionState]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    revived: int = 0
    last_fault: dict[str, Any] | None = None
    reason: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None where no server was started with this folder. PlexrankError where the file is not one of ours."""
        path = folder / FILE
        try:
            held = json.loads(path.read_bytes())
            for name in ("supervisor", "server", "follower"):
                held[name] = held[name] and Identity(**held[name])
            if not held["prefix"].startswith(PREFIX):
                raise ValueError(f"shared memory {held['prefix']!r}")
            held["models"] = {m: {v: VersionState(**s) for v, s in vs.items()} for m, vs in held["models"].items()}
            return cls(**held)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlexrankError(f"{path}: not a state of `plexrank triton up` ({error}); remove it") from error

    def write(self, folder: Path) -> None:
        """Whole or not at all; for its owner's eyes, as it holds the secret."""
        write_whole(folder / FILE, json.dumps(asdict(self), indent=1).encode(), durable=False, mode=0o600)

    def fault(self, what: str) -> None:
        """Kept as the last one, on one line."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.last_fault = {"time": now, "what": " ".join(what.split())}


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go of it, kill -9 included. PlexrankError names the holder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = hold(folder / "lock")
    except Held as other:
        raise PlexrankError(
            f"{folder}: a server runs with this state already ({other.holder}); "
            "run: plexrank triton down, or give this one another --dir"
        ) from None
    with held:
        yield
