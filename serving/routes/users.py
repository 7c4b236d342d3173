"""GET /v1/users, GET and DELETE /v1/users/{user}, GET /v1/items/{item}."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

from engine.errors import RequestError
from serving.openapi import gives
from serving.server import Server, answer
from serving.views import CatalogueItemOut, ErasedOut, UserOut, UsersOut, VisitOut


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["users and items"])
    service = server.service

    def show(user: str) -> UserOut:
        state = service.user(service.check_user(user))
        if not (state.features or state.history or state.seen):
            raise RequestError("nothing is known of this user", status=404)
        history = [
            VisitOut(item, server.title(item), time) for item, time in zip(state.history, state.times, strict=True)
        ]
        return UserOut(user, state.features, history, len(state.seen))

    def erase(user: str) -> ErasedOut:
        erased = service.erase(service.check_user(user))
        return ErasedOut(user, erased.state, erased.events)

    def item_of(item: str) -> CatalogueItemOut:
        catalogue = service.pipeline.served.catalogue
        row = int(catalogue.rows([item])[0])
        if row < 0:
            raise RequestError("the catalogue has no such item", status=404)
        attributes = {name: catalogue.raw(name, np.array([row]))[0] for name in catalogue.attributes}
        return CatalogueItemOut(item, catalogue.title(row), attributes)

    @routes.get("/users", summary="Users that are known", responses=gives(UsersOut, "Their ids, in order", 422))
    async def users(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        prefix: Annotated[str, Query(max_length=256, description="of the id")] = "",
    ) -> Response:
        return answer(UsersOut(await server.chores.run(service.users, limit, prefix)))

    @routes.get(
        "/users/{user:path}",
        summary="What is kept of a user",
        responses=gives(UserOut, "Features, and the history newest first", 404, 422),
    )
    async def user(user: Annotated[str, Path(description="the user's id")]) -> Response:
        return answer(await server.chores.run(show, user))

    @routes.delete(
        "/users/{user:path}",
        summary="Forget a user",
        description="Removes the state, and the events from the log: they are hidden for good when this answers, and "
        "their bytes are removed soon after. Forgetting somebody unknown is no error.",
        responses=gives(ErasedOut, "What was removed", 422),
    )
    async def forget(user: Annotated[str, Path(description="the user's id")]) -> Response:
        return answer(await server.chores.run(erase, user))

    @routes.get(
        "/items/{item:path}",
        summary="An item of the catalogue",
        responses=gives(CatalogueItemOut, "Its title and attributes", 404, 422),
    )
    async def item(item: Annotated[str, Path(description="the item's id")]) -> Response:
        return answer(await server.chores.run(item_of, item))

    return routes
