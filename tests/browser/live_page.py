"""A server in a thread, and a watch over what a page in the browser says and asks for."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
import uvicorn
from fastapi import FastAPI


def absent(reason: str) -> NoReturn:
    """Skips, or fails where everything is required."""
    if os.environ.get("PLEXRANK_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def serve(app: FastAPI) -> tuple[str, Callable[[], None]]:
    """Runs an application on a free port of this machine -> (origin, stop)."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    for _ in range(1200):
        if server.started:
            break
        time.sleep(0.05)
    assert server.started, "the server did not start within a minute"

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()

    return f"http://127.0.0.1:{sock.getsockname()[1]}", stop


@dataclass
class Watch:
    """What a page said and asked for while it was open."""

    origin: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def attach(self, page: object) -> None:
        page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(self.origin) else self.foreign.append(r.url))

    def check(self) -> None:
        unexpected = [e for e in self.errors if not any(part in e for part in self.expected)]
        assert not unexpected, f"the console has errors: {unexpected}"
        assert not self.foreign, f"requests left the origin: {self.foreign}"
