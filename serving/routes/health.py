"""GET /health/live, GET /health/ready, GET /metrics."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.deadline import Workers
from serving.codec import ModelOut
from serving.errors import problem
from serving.metrics import MEDIA_TYPE
from serving.openapi import fails, gives
from serving.server import Server, answer
from serving.views import AliveOut, ReadyOut

log = logging.getLogger("plexrank.serving")
READY_SECONDS = 2.0


class Probe:
    """One real scoring at a time, shared by all who ask meanwhile."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._workers = Workers("health", 1)
        self._running: asyncio.Future[float] | None = None

    def _score(self) -> float:
        begin = time.perf_counter()
        self._server.service.scorer.health()
        return time.perf_counter() - begin

    async def seconds(self) -> float:
        """How long a scoring takes now; raises what it raises, TimeoutError after two seconds."""
        if self._running is None or self._running.done():
            self._running = asyncio.wrap_future(self._workers.begin(self._score))
        return await asyncio.wait_for(asyncio.shield(self._running), READY_SECONDS)


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["health"])
    probe = Probe(server)

    @routes.get("/health/live", summary="The process answers", responses=gives(AliveOut, "It does"))
    async def live() -> Response:
        return answer(AliveOut("live"))

    @routes.get(
        "/health/ready",
        summary="A real scoring was done",
        responses=gives(ReadyOut, "Rankings can be asked for"),
    )
    async def ready(request: Request) -> Response:
        try:
            seconds = await probe.seconds()
        except Exception as error:
            log.warning("not ready: %s: %s", type(error).__name__, error)
            return problem(request.scope, 503, f"the scorer does not answer: {type(error).__name__}")
        service = server.service
        model = ModelOut(service.pipeline.served.bundle.name, service.scorer.version)
        return answer(ReadyOut("ready", model, round(1e3 * seconds, 3), server.degraded()))

    @routes.get(
        "/metrics",
        summary="Prometheus metrics",
        responses={
            200: {
                "description": "In base units, without ids",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **{code: fails(code) for code in (401, 421, 500)},
        },
    )
    async def metrics() -> Response:
        return Response(server.metrics.render(), headers={"Content-Type": MEDIA_TYPE})

    return routes
