"""Whether rankings can be asked for: a real scoring."""

from __future__ import annotations

import asyncio
import time

from engine.deadline import Workers
from serving.service import Service

READY_SECONDS = 2.0


class Probe:
    """One real scoring at a time, shared by all who ask meanwhile."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._workers = Workers("health", 1)
        self._running: asyncio.Future[float] | None = None

    def _score(self) -> float:
        begin = time.perf_counter()
        self._service.scorer.health()
        return time.perf_counter() - begin

    async def seconds(self) -> float:
        """How long a scoring takes now; raises what it raises, TimeoutError after two seconds."""
        if self._running is None or self._running.done():
            self._running = asyncio.wrap_future(self._workers.begin(self._score))
        return await asyncio.wait_for(asyncio.shield(self._running), READY_SECONDS)
