"""One at a time: a lock for a moment, and a lease for as long as a process publishes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine.errors import BundleError
from engine.files import write_whole

BEAT_SECONDS = 2.0
STALE_SECONDS = 15.0


@contextmanager
def locked(path: Path, timeout: float = 10.0) -> Iterator[None]:
    """Holds an exclusive lock on a file; BundleError if another process does not let go in `timeout` seconds."""
    until = time.monotonic() + timeout
    try:
        opened = path.open("a")
    except OSError as error:
        raise BundleError(f"{path}: cannot be locked: {error.strerror or error}") from None
    with opened as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise BundleError(f"{path.parent}: another process is changing it; try again") from None
                time.sleep(0.01)
        yield


class Lease:
    """The right to publish one model: a locked file that says who has it, kept fresh by a heartbeat.

    On one machine the lock decides: it goes with its process, kill -9 included. Between machines that share the folder,
    where locks may not reach, one whose heartbeat is younger than `STALE_SECONDS` is respected.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, uuid.uuid4().hex
        self._stop = threading.Event()
        self._pid = os.getpid()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = path.with_name(f"{path.name}.lock").open("a")
        try:
            self._take()
        except BaseException:
            self._lock.close()
            raise
        threading.Thread(target=self._beat_on, name="plexrank-lease", daemon=True).start()

    def _take(self) -> None:
        holder = _holder(self.path)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(holder) from None
        age = time.time() - float(holder.get("heartbeat", 0.0))
        if holder.get("host", socket.gethostname()) != socket.gethostname() and abs(age) < STALE_SECONDS:
            raise self._refusal(holder)
        self.beat()

    def _refusal(self, holder: dict[str, Any]) -> BundleError:
        return BundleError(
            f"{self.path.parent}: process {holder.get('pid', '?')} on {holder.get('host', '?')} publishes this model "
            "already; stop it, or give this learner another registry"
        )

    def beat(self) -> None:
        """Writes that the holder is alive."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time(), "token": self.token}
        write_whole(self.path, json.dumps(holder).encode())

    def check(self) -> None:
        """BundleError if the lease went to another: this process slept for too long."""
        holder = _holder(self.path)
        if holder.get("token", self.token) != self.token or os.getpid() != self._pid:
            raise self._refusal(holder)

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self.check()
                self.beat()
            except (OSError, BundleError):
                continue  # a full disk passes; a lease that is lost is said where it is used

    def release(self) -> None:
        """The next may have it at once."""
        if not self._stop.is_set():
            self._stop.set()
            if _holder(self.path).get("token") == self.token:
                self.path.unlink(missing_ok=True)
            self._lock.close()


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
