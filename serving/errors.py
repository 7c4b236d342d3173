"""Every error as `application/problem+json` (RFC 9457), also those of the framework."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from engine.errors import BundleError, EventError, PlexrankError, RequestError

log = logging.getLogger("plexrank.serving")

MEDIA_TYPE = "application/problem+json"
PROBLEMS = {
    400: ("malformed", "The body cannot be read"),
    401: ("unauthorized", "A token is needed"),
    403: ("forbidden", "Refused"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "The address does not take this method"),
    408: ("too-slow", "The request did not come in time"),
    409: ("conflict", "What is there does not allow it"),
    413: ("too-large", "The body is too large"),
    415: ("unsupported-media-type", "The body is not of a type that is understood"),
    421: ("misdirected", "The Host header does not name this server"),
    422: ("unprocessable", "The request does not fit"),
    431: ("head-too-large", "The request's head is too large"),
    500: ("internal", "The server failed"),
    503: ("unavailable", "The server cannot answer now"),
    504: ("late", "The answer did not come in time"),
}
"""status -> (name of the problem's type, title). The types are explained at /docs."""


class Fault(msgspec.Struct):
    """One thing that is wrong: where in the body (RFC 6901), and what."""

    pointer: str
    detail: str


class Problem(msgspec.Struct, omit_defaults=True):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[Fault] = []


def problem(
    scope: Any, status: int, detail: str, *, faults: list[Fault] | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The answer for a failure. scope: the ASGI scope, for the address and the request id."""
    name, title = PROBLEMS.get(status, ("error", _phrase(status)))
    body = Problem(
        type=f"/docs#problem-{name}",
        title=title,
        status=status,
        detail=detail,
        instance=scope.get("path", ""),
        request_id=scope.get("plexrank.request_id", ""),
        errors=faults or [],
    )
    extra = dict(headers or {})
    if status == 503:
        extra.setdefault("Retry-After", "1")
    return Response(msgspec.json.encode(body), status_code=status, media_type=MEDIA_TYPE, headers=extra)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def status_of(error: PlexrankError) -> int:
    """The status of an error of the engine."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, EventError):
        return 503  # the log cannot be written; a refused event never gets here
    return 422 if isinstance(error, BundleError) else 503


def install(app: FastAPI) -> None:
    """Puts problems in place of the framework's own error bodies."""

    @app.exception_handler(PlexrankError)
    async def engine_error(request: Request, error: PlexrankError) -> Response:
        faults = None
        if isinstance(error, RequestError) and error.pointer:
            faults = [Fault(error.pointer, str(error))]
        elif not isinstance(error, RequestError):
            log.warning("request %s: %s", request.scope.get("plexrank.request_id"), error)
        return problem(request.scope, status_of(error), str(error), faults=faults)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return problem(request.scope, error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def parameter_error(request: Request, error: RequestValidationError) -> Response:
        faults = [Fault("/" + "/".join(str(part) for part in e["loc"]), str(e["msg"])) for e in error.errors()]
        return problem(request.scope, 422, "; ".join(f"{f.pointer}: {f.detail}" for f in faults), faults=faults)
