"""A real server in this process, on a free port, over a copy of the tiny bundle."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from serving.app import create_app
from serving.protocol import BoundedProtocol
from serving.service import Service


@dataclass
class Running:
    """A server that listens. client: for its address; service: what it holds."""

    app: FastAPI
    client: httpx.Client
    port: int

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def click(self, user: str, item: str, id_: str, **data: Any) -> httpx.Response:
        body = {
            "id": id_,
            "source": "test",
            "specversion": "1.0",
            "type": "interaction",
            "data": {"type": "click", "user": user, "item": item} | data,
        }
        return self.client.post("/v1/events", json=body)


def run(app: FastAPI) -> tuple[Running, Callable[[], None]]:
    """Listens on a free port -> (the server, what stops it)."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, http=BoundedProtocol))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    for _ in range(1200):
        if server.started:
            break
        time.sleep(0.02)
    assert server.started, "the server did not start"
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def stop() -> None:
        client.close()
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()

    return Running(app, client, port), stop


@pytest.fixture(scope="session")
def models(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `tiny` and `other` (the same under another name)."""
    root = tmp_path_factory.mktemp("served")
    for name in ("tiny", "other"):
        shutil.copytree(tiny_bundle, root / name)
    return root


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests of a file; they share its state, so each takes users of its own."""
    running, stop = run(create_app(models / "tiny", None, tmp_path_factory.mktemp("state")))
    yield running
    stop()


@pytest.fixture(scope="session")
def listen() -> Callable[[FastAPI], tuple[Running, Callable[[], None]]]:
    """For tests that need a server of their own."""
    return run
