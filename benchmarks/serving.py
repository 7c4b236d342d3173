"""A server of its own process, as users start it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.raw_http import free_port, wait_until_ready


@contextmanager
def serving(bundle: Path, state: Path, *, models: Path | None = None, config: Path | None = None) -> Iterator[int]:
    """Starts it, waits until it is ready -> its port; ends it."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "engine", "serve", str(bundle)]
    command += ["--port", str(port), "--state-dir", str(state), "--log-level", "warning"]
    command += [] if models is None else ["--models", str(models)]
    command += [] if config is None else ["--config", str(config)]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(port, server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)
