"""A client that adds next to nothing: one kept connection, requests made beforehand, answers read whole."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any


class Connection:
    """HTTP/1.1 over loopback, kept open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The bytes of a POST."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def send(self, request: bytes) -> bytes:
        """-> the answer's body. RuntimeError unless it is 200."""
        self._socket.sendall(request)
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._some()
        head = bytes(received[:end]).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        while len(received) < end + 4 + length:
            received += self._some()
        body = bytes(received[end + 4 :])
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(body.decode(errors="replace"))
        return body

    def _some(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise RuntimeError("the server closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(port: int, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the port is listened at. RuntimeError if the server ends or takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            Connection(port).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {seconds:.0f} s")
