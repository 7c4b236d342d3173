"""POST /v1/events."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.errors import RequestError
from engine.intake import Received
from serving.codec import decode
from serving.errors import Fault, problem
from serving.limits import JSON, LINES, media_type, read_body
from serving.openapi import gives
from serving.server import Server, answer
from serving.views import EventsOut

_EXAMPLE = {
    "id": "2f1c7e0a",
    "source": "shop",
    "specversion": "1.0",
    "type": "interaction",
    "data": {"type": "click", "user": "1", "item": "2"},
}
_ONE = {"$ref": "#/components/schemas/Envelope"}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 1}]},
                "example": _EXAMPLE,
            },
            "application/x-ndjson": {"schema": {"type": "string"}},
        },
    }
}


def split(body: bytes, kind: str) -> list[bytes | msgspec.Raw]:
    """One object, an array, or a line an event -> the events' own JSON. RequestError if it is none of these."""
    documents: list[bytes | msgspec.Raw]
    if kind in LINES:
        documents = [line for line in body.split(b"\n") if line.strip()]
    elif body.lstrip()[:1] == b"[":
        documents = list(decode(body, list[msgspec.Raw]))
    else:
        decode(body, dict[str, msgspec.Raw])
        documents = [body]
    if not documents:
        raise RequestError("there is no event in the body")
    return documents


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["events"])

    def receive(documents: list[bytes | msgspec.Raw]) -> Received:
        received = server.service.receive(documents)
        server.metrics.received(received)
        return received

    @routes.post(
        "/events",
        status_code=202,
        summary="Tell what happened",
        description="CloudEvents 1.0: one object, an array, or one a line (NDJSON). The type ends in `interaction` "
        "(data: type, user, item, ranking), `user`, `item` or `ranking`. Answered when they are durable; a click is in "
        "the user's history by then. An event is known by source and id: sent again, it is a `duplicate`. 422 where "
        "every one is refused.",
        openapi_extra=_BODY,
        responses=gives(EventsOut, "One receipt an event", 413, 415, 422, status=202),
    )
    async def events(request: Request) -> Response:
        kind = media_type(request, JSON | LINES)
        documents = split(await read_body(request, server.limits.body_bytes), kind)
        received: Received = await server.events.run(receive, documents)
        if received.count("refused") == len(documents):
            faults = [Fault(f"/{n}", r.error or "") for n, r in enumerate(received.receipts[:100])]
            first = received.receipts[0].error
            detail = (
                f"the event was refused: {first}" if len(documents) == 1 else f"all were refused, the first: {first}"
            )
            return problem(request.scope, 422, detail, faults=faults)
        return answer(EventsOut(received.receipts, received.degraded), 202)

    return routes
