"""GET /health/live, GET /health/ready, GET /metrics."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.codec import ModelOut
from serving.errors import problem
from serving.metrics import MEDIA_TYPE
from serving.openapi import fails, gives
from serving.probe import Probe
from serving.server import Server, answer
from serving.views import AliveOut, ReadyOut

log = logging.getLogger("plexrank.serving")


def router(server: Server, probe: Probe) -> APIRouter:
    routes = APIRouter(tags=["health"])

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
        return Response(await server.chores.run(server.metrics.render), headers={"Content-Type": MEDIA_TYPE})

    return routes
