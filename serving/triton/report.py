"""What another shell sees of a launched server, and how it ends it."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from engine.errors import PlexrankError
from serving.triton import shm
from serving.triton.client import TritonClient, TritonError
from serving.triton.follow_status import followed
from serving.triton.probe import try_version
from serving.triton.repository import ModelFolder
from serving.triton.state import State, wait_until
from serving.triton.stubs import Stubs, end_all

_SECONDS = 60.0
"""That a supervisor has to end its server, before both are killed."""


def examine(folder: Path) -> dict[str, Any]:
    """How the server with this state is, asked just now. `ok`: it runs, and all models answer a real inference."""
    state = State.read(folder)
    if state is None or not state.supervisor.alive:
        return {"ok": False, "running": False, "dir": str(folder), "reason": f"{folder}: no server runs{_why(state)}"}
    models: list[dict[str, Any]] = []
    faults = dict(state.faults)
    version = ""
    with TritonClient(state.url, state.control) as client:
        try:
            version = client.server_version(2.0)
            for listed in client.index():
                if listed.state == "READY":
                    models.append(_asked(client, Path(state.repository), listed.model, listed.version))
        except TritonError as error:
            faults["tritonserver"] = str(error)
    if not models and not faults:
        faults["repository"] = "no model is loaded; run: plexrank triton deploy BUNDLE"
    return {
        "ok": state.phase == "ready" and bool(models) and all(m["ready"] for m in models) and not faults,
        "running": True,
        "phase": state.phase,
        "dir": str(folder),
        "repository": state.repository,
        "url": state.url,
        "ports": state.ports,
        "tritonserver": version,
        "pid": state.supervisor.pid,
        "models": models,
        "faults": faults,
        "restarts": state.restarts,
        "revived": state.revived,
        "last_fault": None if state.last_fault is None else f"{state.last_fault['time']} {state.last_fault['what']}",
        "follower": None if state.follower is None else state.follower.pid,
        "followed": followed(Path(state.repository)),
        **_memory(state),
    }


def _why(state: State | None) -> str:
    """What is known of the end of a server that does not run."""
    if state is None:
        return "; run: plexrank triton up"
    if state.reason:
        return f": {state.reason}"
    if state.phase == "stopped":
        return " (stopped)"
    return f": process {state.supervisor.pid}, which kept it, was killed while it was {state.phase}; start it again"


def _asked(client: TritonClient, repository: Path, model: str, version: str) -> dict[str, Any]:
    try:
        found = asdict(try_version(client, ModelFolder(repository / model), version))
    except TritonError as error:
        found = {"ready": False, "tested": True, "answers": "", "seconds": None, "fault": str(error)}
    seconds = found.pop("seconds")
    return {"model": model, "version": version, **found, "milliseconds": seconds and round(seconds * 1000, 2)}


def _memory(state: State) -> dict[str, Any]:
    """Bytes: of the server, of each model process (what it shares counts by its share), of the shared memory."""
    if state.server is None:
        return {}
    stubs = [
        {"pid": stub.process.pid, "model": stub.model, "version": stub.version, "bytes": _bytes(stub.process.pid)}
        for stub in Stubs(state.server.pid).alive()
    ]
    return {
        "server_pid": state.server.pid,
        "server_bytes": _bytes(state.server.pid),
        "instances": stubs,
        "instance_bytes": sum(stub["bytes"] or 0 for stub in stubs),
        "shm_prefix": state.prefix,
        "shm_bytes": sum(path.stat().st_size for path in shm.regions(state.prefix)),
    }


def _bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except (psutil.Error, OSError):
        return None


def stop(folder: Path) -> int:
    """Ends the supervisor, and with it the server -> its pid; 0 where none ran: then leftovers are ended and removed.

    PlexrankError where it does not end, not even killed.
    """
    state = State.read(folder)
    if state is None:
        return 0
    ran = state.supervisor.alive
    left = [process for process in (state.follower, state.server) if process is not None]
    if ran:
        state.supervisor.send(signal.SIGTERM)
        wait_until(lambda: not state.supervisor.alive, _SECONDS)
    for process in (state.supervisor, *left):
        if process.alive:
            process.end(15.0)
        if process.alive:
            raise PlexrankError(f"process {process.pid} does not end; see its log in {folder}")
    end_all(state.prefix)
    shm.clear(state.prefix)
    return state.supervisor.pid if ran else 0
