"""GET /v1/models, POST /v1/models:load, GET /v1/plugins."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.codec import LoadIn, ModelOut
from serving.openapi import gives, takes
from serving.server import Server, answer
from serving.views import LoadedOut, ModelsOut, PluginOut, PluginsOut


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["models and plugins"])
    service = server.service

    def about() -> ModelsOut:
        bundle = service.pipeline.served.bundle
        return ModelsOut(ModelOut(bundle.name, bundle.version), service.path.name, service.since, service.names())

    def load(name: str) -> LoadedOut:
        previous = service.pipeline.served.bundle.version
        bundle = server.load(name)
        return LoadedOut(ModelOut(bundle.name, bundle.version), previous)

    def table() -> PluginsOut:
        used = service.used()
        return PluginsOut(
            [
                PluginOut(p.kind, p.name, p.distribution, p.version, p.module, p.summary, (p.kind, p.name) in used)
                for p in service.plugins.table()
            ]
        )

    @routes.get("/models", summary="What serves", responses=gives(ModelsOut, "The bundle, and those beside it"))
    async def models() -> Response:
        return answer(await server.chores.run(about))

    @routes.post(
        "/models:load",
        summary="Serve another bundle",
        description="A bundle in the same folder as the one that serves, by its name. It is verified, loaded aside and "
        "warmed; then one pointer is set. A bundle that is not fit is refused (422), and the one before goes on.",
        openapi_extra=takes(LoadIn, {"name": "movielens-100k"}),
        responses=gives(LoadedOut, "It serves from now on", 404, 409, 413, 415, 422),
    )
    async def load_route(request: Request) -> Response:
        asked = await server.body(request, LoadIn)
        return answer(await server.chores.run(load, asked.name))

    @routes.get("/plugins", summary="Installed plugins", responses=gives(PluginsOut, "One row a plugin"))
    async def plugins() -> Response:
        return answer(await server.chores.run(table))

    return routes
