"""The outermost layer: request id, who may ask, safe headers, times, and an answer whatever happens inside."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import OPEN_PATHS, Guard
from serving.errors import problem
from serving.metrics import Metrics

log = logging.getLogger("plexrank.serving")

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
GONE = 499
"""Counted for a client that hung up before its request was whole; nobody gets it."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Edge:
    """ASGI middleware. Sets `plexrank.request_id` and `plexrank.begin` (time.monotonic()) in the scope."""

    def __init__(self, app: ASGIApp, guard: Guard, metrics: Metrics) -> None:
        self.app, self.guard, self.metrics = app, guard, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.monotonic()
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        scope["plexrank.request_id"], scope["plexrank.begin"] = request_id, begin
        status = 500
        started = False

        async def reply(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
            await send(message)

        # Whatever answers GET answers HEAD: the server below leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            refusal = self._refuse(scope, headers)
            await (refusal or self.app)(inner, receive, reply)
        except ClientDisconnect:
            status = GONE
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await problem(scope, 500, "an unexpected error; the server's log has it under this request id")(
                scope, receive, reply
            )
        finally:
            route = inner.get("route")
            self.metrics.answered(getattr(route, "path", "unmatched"), scope["method"], status, begin)

    def _refuse(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        if not self.guard.knows_host(headers.get("host", "")):
            return problem(scope, 421, "without a token only 127.0.0.1 and localhost are answered as Host")
        if scope["method"] not in _SAFE and headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site"):
            return problem(scope, 403, "a page of another site may not change anything here")
        if scope["path"] not in OPEN_PATHS and not self.guard.allows(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Bearer realm="plexrank", Basic realm="plexrank"'}
            return problem(scope, 401, "send the token as 'Authorization: Bearer ...'", headers=challenge)
        return None


def request_id_of(headers: Headers) -> str:
    """The caller's X-Request-Id, else the trace id of its traceparent (W3C), else a new one."""
    given = headers.get("x-request-id", "")
    if _REQUEST_ID.fullmatch(given):
        return given
    trace = _TRACE.fullmatch(headers.get("traceparent", ""))
    return f"{trace[1]}-{uuid.uuid4().hex[:8]}" if trace else uuid.uuid4().hex
