"""The FastAPI application: one bundle, its routes, and what stands around them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from engine import __version__
from engine.config import ServingConfig
from engine.errors import PlexrankError
from engine.plugins import Plugins
from serving import docs, errors, playground
from serving.auth import Guard, token_from
from serving.console import ServerConsole
from serving.edge import Edge
from serving.metrics import Metrics
from serving.openapi import publish
from serving.probe import Probe
from serving.routes import events, explain, health, models, oip, rank, users
from serving.server import Server
from serving.service import Service


def create_app(
    bundle: Path,
    config: ServingConfig | None,
    state_dir: Path,
    *,
    plugins: Plugins | None = None,
    insecure: bool = False,
) -> FastAPI:
    """An application that is ready to answer: the bundle is loaded and warmed before this returns.

    config: by default the section `serving` in the bundle. state_dir: users' states and the log of events.
    insecure: answer any Host without a token. Raises BundleError, PluginError, EventError, ConfigError.
    """
    service = Service.open(bundle, config, state_dir, plugins)
    try:
        return serve_with(service, insecure=insecure)
    except PlexrankError:
        service.close()
        raise


def serve_with(service: Service, *, insecure: bool = False) -> FastAPI:
    """The application over an open service, which it closes at the end."""
    variable = service.config.token_env
    guard = Guard(token_from(variable), any_host=insecure)
    metrics = Metrics(service)
    server = Server(service, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="plexrank",
        version=__version__,
        description="Retrieves, ranks, learns from what happened, and says why.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = server
    app.state.service = service
    errors.install(app)
    for routes in (rank, events, explain, users, models):
        app.include_router(routes.router(server))
    probe = Probe(service)
    for probed in (health, oip):
        app.include_router(probed.router(server, probe))
    play = playground.Playground(ServerConsole(server), variable)
    service.forgetful.append(play.forget)
    app.include_router(playground.router(play))
    _document(app)
    publish(app, secured=guard.needs_token)
    app.add_middleware(Edge, guard=guard, metrics=metrics)
    return app


def _document(app: FastAPI) -> None:
    """GET /docs, without a script."""

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> Response:
        return HTMLResponse(docs.page(app.openapi(), str(request.base_url).rstrip("/")))

    @app.get("/docs.css", include_in_schema=False)
    async def style() -> Response:
        return Response(docs.STYLE, media_type="text/css")


def from_environment() -> FastAPI:
    """For `uvicorn --factory serving.app:from_environment`: PLEXRANK_BUNDLE and PLEXRANK_STATE name the folders."""
    return create_app(Path(os.environ["PLEXRANK_BUNDLE"]), None, Path(os.environ.get("PLEXRANK_STATE", "state")))
