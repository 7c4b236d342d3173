"""HTTP/1.1 as uvicorn speaks it, with bounds that it leaves open: connections, and the bytes and seconds of a head."""

from __future__ import annotations

import asyncio
import socket
from asyncio.events import TimerHandle
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.errors import ConfigError
from serving.errors import MEDIA_TYPE, PROBLEMS, Problem

CONNECTIONS = 512
"""Connections at once: half of what a process may usually hold open."""

HEAD_BYTES = 64 << 10
HEAD_SECONDS = 10.0
"""From a connection, or from the first byte of a request, to the end of its head."""


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address, not listening yet; ConfigError if the address is taken or not of this machine."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"{host}: {error.strerror}; choose another with --host") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"port {port} of {host}: {error.strerror}; choose another with --port") from error
    return sock


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Who is too many, too slow or too long is told so, and the connection is closed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head = 0  # bytes of an unfinished head
        self._in_head = False
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(503, f"{CONNECTIONS} connections are open; try again soon")
        else:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse(431, f"a request's head has more than {HEAD_BYTES:,} bytes")
        if self._timer is None and not self._busy:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def on_message_begin(self) -> None:
        self._in_head, self._head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _late(self) -> None:
        self._timer = None
        if self._busy:  # the next request's head, while one is answered: when that is done, uvicorn's own timer runs
            return
        self._refuse(408, f"no whole request within {HEAD_SECONDS:.0f} seconds")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, detail: str) -> None:
        """Says why, unless an answer is under way, and closes."""
        if self.transport.is_closing():
            return
        if not (self._busy and self.cycle.response_started):
            name, title = PROBLEMS[status]
            body = msgspec.json.encode(Problem(f"/docs#problem-{name}", title, status, detail, "", ""))
            retry = "retry-after: 1\r\n" if status == 503 else ""
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
                f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
