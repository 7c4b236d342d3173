"""The processes in which the server runs its Python models. Triton neither starts a dead one again nor says so."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.triton.shm import FOLDER
from serving.triton.state import Identity, wait_until

NAME = "triton_python_backend_stub"
_LINGER = 10.0
"""Seconds that the process of a version that was replaced has to end requests that it began."""


@dataclass(frozen=True)
class Stub:
    """One instance of one version of a model. region: its name in shared memory."""

    process: Identity
    model: str
    version: str
    region: str


class Stubs:
    """Those of one server, looked at again and again."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._known: dict[int, Stub] = {}
        self._dead: dict[int, int] = {}
        self._done: set[int] = set()
        self._replaced: dict[Stub, float] = {}

    def alive(self) -> list[Stub]:
        """Those that run, hung ones included."""
        self._look()
        return [stub for stub in self._known.values() if stub.process.alive]

    def died(self) -> set[tuple[str, str]]:
        """(model, version) whose process ended though the server wants it, told until `replaced` is called.

        One that the server ends itself is dead for a moment too: it counts when two looks have seen it.
        """
        self._look()
        for pid in self._known:
            if pid not in self._done and not self._known[pid].process.alive:
                self._dead[pid] = self._dead.get(pid, 0) + 1
        return {(self._known[pid].model, self._known[pid].version) for pid, looks in self._dead.items() if looks > 1}

    def of(self, model: str, version: str) -> list[Stub]:
        """Alive or dead, not yet replaced."""
        self._look()
        return [
            s for pid, s in self._known.items() if pid not in self._done and (s.model, s.version) == (model, version)
        ]

    def replaced(self, stubs: Iterable[Stub]) -> None:
        """The server has others now in place of these: they have some time to end, and what they leave is removed."""
        for stub in stubs:
            self._done.add(stub.process.pid)
            self._dead.pop(stub.process.pid, None)
            self._replaced[stub] = time.monotonic() + _LINGER

    def tidy(self, now: bool = False) -> None:
        """Ends replaced ones that do not end, at once or in time: Triton keeps the others of a dead one, and hung ones.

        Their MiB of shared memory, which Triton leaves too, is given back.
        """
        for stub, until in list(self._replaced.items()):
            if stub.process.alive and (now or time.monotonic() > until):
                stub.process.send(signal.SIGKILL)
            elif not stub.process.alive:
                (FOLDER / stub.region).unlink(missing_ok=True)
                del self._replaced[stub]

    def _look(self) -> None:
        """Reads the server's children; pids that it has reaped are forgotten."""
        try:
            children = {child.pid: child for child in psutil.Process(self._server).children()}
        except psutil.NoSuchProcess:
            children = {}
        self._known = {pid: stub for pid, stub in self._known.items() if pid in children}
        self._dead = {pid: looks for pid, looks in self._dead.items() if pid in children}
        self._done &= children.keys()
        for pid, child in children.items():
            if pid not in self._known and (stub := _read(child)) is not None:
                self._known[pid] = stub


def end_all(prefix: str) -> int:
    """Kills those whose shared memory has this prefix, their server's or left by one -> how many there were.

    They end by themselves when their server is gone, but not when they hang, or when nobody reaps the dead server.
    """
    found = [_read(process) for process in psutil.process_iter()]
    ours = [stub.process for stub in found if stub is not None and stub.region.startswith(prefix)]
    for process in ours:
        process.send(signal.SIGKILL)
    wait_until(lambda: not any(process.alive for process in ours), 5.0)
    return len(ours)


def _read(child: psutil.Process) -> Stub | None:
    """Its command line: the program, .../<model>/<version>/model.py, the name of its shared memory, ..."""
    identity = Identity.of(child.pid)
    try:
        command = child.cmdline()
    except psutil.Error:
        return None
    if identity is None or len(command) < 3 or Path(command[0]).name != NAME:
        return None
    script = Path(command[1])
    return Stub(identity, script.parents[1].name, script.parent.name, command[2])
