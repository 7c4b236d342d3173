"""Shared memory between the server and its models' processes: our own names, room for them, and their removal."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import PlexrankError

FOLDER = Path("/dev/shm")  # noqa: S108
MIB = 1 << 20
PREFIX = "plexrank-"
"""How the names of all our servers begin."""
_SPARE = 16
"""MiB that large requests may take beyond the first of each instance; it grows, and never shrinks."""


def prefix_of(folder: Path) -> str:
    """How all names of the server with this state folder begin; the same at each start, so that the next cleans up."""
    place = f"{socket.gethostname()}:{folder.resolve()}"
    return f"{PREFIX}{hashlib.sha256(place.encode()).hexdigest()[:12]}-"


def clear(prefix: str, folder: Path = FOLDER) -> int:
    """Removes what a killed server left -> how many. Not while it runs."""
    count = 0
    for path in regions(prefix, folder):
        with suppress(FileNotFoundError):
            path.unlink()
            count += 1
    return count


def regions(prefix: str, folder: Path = FOLDER) -> list[Path]:
    """Files of this prefix."""
    return [p for p in folder.iterdir() if p.name.startswith(prefix)] if folder.is_dir() else []


def require_room(
    instances: int, folder: Path = FOLDER, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
) -> None:
    """PlexrankError where there is too little for so many instances of models, 1 MiB each and some to spare."""
    need = instances + _SPARE
    try:
        found = statvfs(folder)
    except OSError as error:
        raise PlexrankError(f"{folder}: {error.strerror}; Triton's python backend needs shared memory there") from error
    free = found.f_bavail * found.f_frsize
    if free < need * MIB:
        raise PlexrankError(
            f"{folder}: {free / MIB:.1f} MiB free of {found.f_blocks * found.f_frsize / MIB:.1f}, and "
            f"{instances} model instances need {need}: remove what fills it (ls -l {folder}), or make it larger "
            "(docker run --shm-size=1g; mount -o remount,size=1g)"
        )
