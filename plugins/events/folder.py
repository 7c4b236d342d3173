"""The folder of a log: how many partitions, which log it is, and which process writes it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import IO

import msgspec

from engine.errors import EventError, LogUnavailable
from engine.files import Held, hold, sync

_FILE = "log.json"


class Description(msgspec.Struct, frozen=True):
    """What `log.json` says; written once, when the log is begun."""

    partitions: int
    identity: str


def begin(root: Path, partitions: int) -> Description:
    """The description of a log, which is begun where there is none. EventError where its partitions are others.

    Two processes may begin one log at the same time: both get the description of the first.
    """
    there = len(list(root.glob("[0-9][0-9][0-9][0-9]")))  # a log from before there were descriptions
    if not (root / _FILE).exists():
        root.mkdir(parents=True, exist_ok=True)
        made = Description(there or partitions, uuid.uuid4().hex)
        temporary = root / f"{_FILE}.{made.identity}"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(made) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, root / _FILE)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        sync(root)
    found = describe(root)
    if found.partitions != partitions:
        raise EventError(
            f"{root}: the log has {found.partitions} partitions and the configuration says {partitions}; "
            f"set partitions: {found.partitions}, or begin in an empty folder"
        )
    return found


def describe(root: Path) -> Description:
    """LogUnavailable where no log was begun there; EventError where the description is not one."""
    try:
        return msgspec.json.decode((root / _FILE).read_bytes(), type=Description)
    except FileNotFoundError as error:
        raise LogUnavailable(
            f"{root}: there is no event log here yet; start the server that writes it, or correct `path`"
        ) from error
    except msgspec.DecodeError as error:
        raise EventError(f"{root / _FILE}: not the description of an event log: {error}") from error


def own(root: Path) -> IO[str]:
    """Takes the folder for writing until the answer is closed. EventError where another has it."""
    try:
        return hold(root / "lock")
    except Held as error:
        raise EventError(
            f"{root}: {error.holder} writes this event log; stop it, or take another state directory"
        ) from None
    except OSError as error:
        raise EventError(f"{root}: this event log cannot be taken for writing: {error.strerror}") from error
