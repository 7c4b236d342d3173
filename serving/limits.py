"""What protects the server: bodies of bounded size and known type, a bounded number of requests inside."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fastapi import Request

from engine.deadline import Workers
from engine.errors import RequestError

JSON = frozenset({"application/json", "application/cloudevents+json", "application/cloudevents-batch+json"})
LINES = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})


def media_type(request: Request, allowed: frozenset[str]) -> str:
    """The body's type; RequestError (415) for another, so that a form on another site cannot send one."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        names = ", ".join(sorted(allowed))
        raise RequestError(f"Content-Type is '{kind}'; it must be one of {names}", status=415)
    return kind


BODY_SECONDS = 10.0


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. RequestError: 413 once it is known to be longer than `limit` bytes, 408 where it is slow."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise RequestError(f"the body has {declared} bytes; at most {limit} are taken", status=413)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("compressed bodies are not taken", status=415)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise RequestError(f"the body has more than {limit} bytes", status=413)
                chunks.append(chunk)
    except TimeoutError:
        raise RequestError(f"the body did not come within {BODY_SECONDS:.0f} seconds", status=408) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class Gate:
    """Runs work off the event loop, for so many requests at once; one more is refused (503) at the door."""

    def __init__(self, name: str, *, threads: int, waiting: int, refused: Callable[[], None]) -> None:
        """refused: called for each request that finds no place."""
        self.most = threads + waiting
        self._refused = refused
        self._workers = Workers(name, threads)
        self._lock = threading.Lock()
        self.inside = 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's answer, made in a thread of this gate."""
        return await self.follow(lambda: self._workers.begin(function, *arguments))

    async def follow(self, begin: Callable[[], Future[Any]]) -> Any:
        """The outcome of work that runs elsewhere. A client that goes away frees its place only when it is done."""
        with self._lock:
            full = self.inside >= self.most
            self.inside += not full
        if full:
            self._refused()
            raise RequestError(f"{self.most} requests are being answered; try again soon", status=503)
        try:
            future = begin()
        except BaseException as error:
            self._left(None)
            if isinstance(error, RequestError) and error.status == 503:
                self._refused()
            raise
        future.add_done_callback(self._left)
        return await asyncio.wrap_future(future)

    def _left(self, _: object) -> None:
        with self._lock:
            self.inside -= 1

    def close(self) -> None:
        self._workers.close()
