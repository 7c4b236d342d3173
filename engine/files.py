"""Files that must not be lost or changed unseen."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """fsync of a file, or of a folder: then its new and renamed files stay. OSError where the disk cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal digest, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, contents: bytes, *, durable: bool = True, mode: int = 0o644) -> None:
    """A file that is there whole or not at all: written beside, synced, renamed. OSError leaves the old one.

    durable: also after a power cut; without it only after the end of this process. mode: who may read it, from the
    beginning.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(name).chmod(mode)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


class Held(Exception):
    """Another process has the file. holder: which, as `process PID`."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def hold(path: Path) -> IO[str]:
    """A file that is this process' alone until it is closed; the kernel lets go of it, kill -9 included.

    Held with the `process PID` of who has it. OSError where the file cannot be opened or locked at all.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(100).strip()
        file.close()
        raise Held(holder or "another process") from None
    except OSError as error:
        file.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    file.truncate(0)
    file.write(f"process {os.getpid()}\n")
    file.flush()
    return file


def link(source: Path, goal: Path) -> None:
    """The same file under a second name where the file system can, else a copy; for files that never change."""
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, goal)
