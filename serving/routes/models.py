"""GET /v1/models, POST /v1/models:load, :promote, :rollback, :pin and :unpin, GET /v1/plugins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from engine.errors import RequestError
from engine.streaming.deltas.pointer import Pointer
from serving.codec import LoadIn, ModelOut, PinIn, PromoteIn, RollbackIn, UnpinIn
from serving.following import Following
from serving.openapi import gives, takes
from serving.server import Server, answer
from serving.views import FollowingOut, LoadedOut, ModelsOut, PluginOut, PluginsOut, PointerOut


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["models and plugins"])
    service = server.service

    def about() -> ModelsOut:
        bundle = service.pipeline.served.bundle
        model = ModelOut(bundle.name, service.scorer.version)
        return ModelsOut(
            model, bundle.version, service.path.name, service.since, service.names(), service.waiting, followed()
        )

    def followed() -> FollowingOut | None:
        following = server.following
        if following is None:
            return None
        pointer, status = following.registry.current(), following.status()
        newest = server.metrics.freshness.newest
        return FollowingOut(
            current=None if pointer is None else pointer.version,
            epoch=0 if pointer is None else pointer.epoch,
            pinned=pointer is not None and pointer.pinned,
            sequence=0 if status is None else status.sequence,
            newest_event_age_seconds=None if newest is None else max(0.0, time.time() - newest),
            lag_seconds=0.0 if status is None else status.lag_seconds,
            applied=0 if status is None else status.applied,
            gaps=0 if status is None else status.gaps,
            swaps=0 if status is None else status.swaps,
            errors=0 if status is None else status.errors,
            last_error=None if status is None else status.last_error,
            trouble=following.trouble,
        )

    def load(name: str) -> LoadedOut:
        previous = service.pipeline.served.bundle.version
        bundle = server.load(name)
        return LoadedOut(ModelOut(bundle.name, bundle.version), previous)

    def point(change: Callable[[Following], Pointer]) -> PointerOut:
        following = server.following
        if following is None:
            raise RequestError("this server has no registry: start it with --models", status=409)
        before = following.registry.current()
        pointer = change(following)
        previous = None if before is None else before.version
        return PointerOut(pointer.version, pointer.epoch, pointer.reason, pointer.pinned, previous)

    def table() -> PluginsOut:
        used = service.used()
        return PluginsOut(
            [
                PluginOut(p.kind, p.name, p.distribution, p.version, p.module, p.summary, (p.kind, p.name) in used)
                for p in service.plugins.table()
            ]
        )

    @routes.get(
        "/models",
        summary="What serves",
        responses=gives(ModelsOut, "The bundle, what was learned since, what else is there"),
    )
    async def models() -> Response:
        return answer(await server.chores.run(about))

    @routes.post(
        "/models:load",
        summary="Serve another bundle",
        description="A bundle in the same folder as the one that serves, by its name. It is verified, loaded aside and "
        "warmed; then one pointer is set. A bundle that is not fit is refused (422), and the one before goes on. 409 "
        "where a registry says what is served.",
        openapi_extra=takes(LoadIn, {"name": "movielens-100k"}),
        responses=gives(LoadedOut, "It serves from now on", 404, 409, 413, 415, 422),
    )
    async def load_route(request: Request) -> Response:
        asked = await server.body(request, LoadIn)
        return answer(await server.chores.run(load, asked.name))

    @routes.post(
        "/models/{version}:promote",
        summary="Serve a version of the registry",
        description="Every file of it is verified, then it is current: this server and all others that follow the "
        "registry load it. What learners published behind the version before is left. 409 without a registry.",
        openapi_extra=takes(PromoteIn, {"reason": "better on Tuesday's traffic"}),
        responses=gives(PointerOut, "It is current", 404, 409, 413, 415, 422),
    )
    async def promote(
        request: Request, version: Annotated[str, Path(max_length=64, description="of the registry")]
    ) -> Response:
        asked = await server.body(request, PromoteIn)
        return answer(await server.chores.run(point, lambda following: following.promote(version, asked.reason)))

    @routes.post(
        "/models:rollback",
        summary="Serve the version before",
        description="Or the one that is named. The version that is left is not gone back to, unless it is promoted. "
        "409 where there is none to go back to, and without a registry.",
        openapi_extra=takes(RollbackIn, {"reason": "worse on Tuesday's traffic"}),
        responses=gives(PointerOut, "It is current", 404, 409, 413, 415, 422),
    )
    async def rollback(request: Request) -> Response:
        asked = await server.body(request, RollbackIn)
        return answer(await server.chores.run(point, lambda following: following.rollback(asked.to, asked.reason)))

    @routes.post(
        "/models:pin",
        summary="Serve exactly the current bundle",
        description="Without what was learned since: every server that follows the registry goes back to the bundle, "
        "and learners, which go on from it, publish nothing until it is unpinned. 409 without a registry.",
        openapi_extra=takes(PinIn, {"reason": "an audit until Friday"}),
        responses=gives(PointerOut, "It is pinned", 409, 413, 415, 422),
    )
    async def pin(request: Request) -> Response:
        asked = await server.body(request, PinIn)
        return answer(await server.chores.run(point, lambda following: following.pin(asked.reason)))

    @routes.post(
        "/models:unpin",
        summary="Let learners publish again",
        description="What they learned since it was pinned is served at once. 409 without a registry.",
        openapi_extra=takes(UnpinIn, {"reason": "the audit is over"}),
        responses=gives(PointerOut, "It is not pinned", 409, 413, 415, 422),
    )
    async def unpin(request: Request) -> Response:
        asked = await server.body(request, UnpinIn)
        return answer(await server.chores.run(point, lambda following: following.unpin(asked.reason)))

    @routes.get("/plugins", summary="Installed plugins", responses=gives(PluginsOut, "One row a plugin"))
    async def plugins() -> Response:
        return answer(await server.chores.run(table))

    return routes
