"""The OpenAPI document: the hot routes' bodies as msgspec decodes them, with examples that work."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from engine.events import Envelope, InteractionData, ItemData, RankingData, UserData
from engine.intake import Receipt
from serving import oip, views
from serving.codec import LoadIn, PinIn, PromoteIn, RankIn, RankOut, RecommendIn, RollbackIn, UnpinIn
from serving.errors import MEDIA_TYPE, PROBLEMS, Problem

STRUCTS: list[type[Any]] = [
    RankIn,
    RecommendIn,
    LoadIn,
    PromoteIn,
    RollbackIn,
    PinIn,
    UnpinIn,
    RankOut,
    Receipt,
    Problem,
    Envelope,
    InteractionData,
    UserData,
    ItemData,
    RankingData,
    *views.ALL,
    *oip.STRUCTS,
]
_REF = "#/components/schemas/{name}"


def takes(kind: type[Any], example: Any) -> dict[str, Any]:
    """`openapi_extra` of a route that decodes its own body."""
    content = {"application/json": {"schema": _ref(kind), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def gives(kind: type[Any], description: str, *errors: int, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: its answer, and the errors that it may give beside those of every route."""
    every = {400, 401, 403, 421, 500, 503, *errors, *({408} if 413 in errors else ())}
    return {
        status: {"description": description, "content": {"application/json": {"schema": _ref(kind)}}},
        **{code: fails(code) for code in sorted(every)},
    }


def fails(code: int) -> dict[str, Any]:
    return {"description": PROBLEMS[code][1], "content": {MEDIA_TYPE: {"schema": _ref(Problem)}}}


def _ref(kind: type[Any]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def publish(app: FastAPI, *, secured: bool) -> None:
    """Makes `app.openapi()` the whole document; made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            _, schemas = msgspec.json.schema_components(STRUCTS, ref_template=_REF)
            components = made.setdefault("components", {})
            kept = {k: v for k, v in components.get("schemas", {}).items() if "ValidationError" not in k}
            components["schemas"] = {**kept, **schemas}
            if secured:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"token": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
