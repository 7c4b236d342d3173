"""GET /v2..., POST /v2/models/MODEL/infer: the Open Inference Protocol (KServe v2), so that its clients can ask here.

The tensors are those of the exported model (`engine.inference.signature`). Beside them ids may come as BYTES, which are
hashed here, and numbers as they are, as FP64. Errors are the protocol's `{"error": ...}`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial, wraps
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine import __version__
from engine.config import LimitsConfig
from engine.data.encoder import FeatureEncoder
from engine.deadline import Deadline
from engine.errors import PlexrankError, RequestError
from engine.hashing import fingerprints
from engine.inference.signature import CANDIDATES, VERSION, Signature
from serving import oip
from serving.codec import ids
from serving.docs import EXAMPLE_PATH
from serving.errors import MEDIA_TYPE as PROBLEM_TYPE
from serving.errors import PROBLEMS, Problem, status_of
from serving.limits import read_body
from serving.probe import Probe
from serving.server import Server
from serving.service import Service

log = logging.getLogger("plexrank.serving")

PLATFORM = "plexrank"
EXTENSIONS = ["binary_tensor_data"]
Route = Callable[..., Awaitable[Response]]


def router(server: Server, probe: Probe) -> APIRouter:
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])
    service = server.service

    def get(path: str, summary: str, kind: type[Any]) -> Callable[[Route], Route]:
        return lambda route: routes.get(path, summary=summary, responses=_gives(kind))(_protocol(route))

    def versioned(path: str, summary: str, kind: type[Any]) -> Callable[[Route], Route]:
        """Both addresses of a model: as it is, and by its version."""

        def add(route: Route) -> Route:
            get(f"/models/{{model}}{path}", summary, kind)(route)
            return get(f"/models/{{model}}/versions/{{version}}{path}", f"{summary}, of one version", kind)(route)

        return add

    def check(model: str, version: str | None) -> None:
        """404 for a model or a version that does not serve here."""
        bundle = service.pipeline.served.bundle
        if model != bundle.name:
            raise RequestError(f"there is no model '{model}'; '{bundle.name}' serves", status=404)
        if version not in (None, bundle.version, service.scorer.version):
            raise RequestError(f"model '{model}' has no version '{version}'; {bundle.version} serves", status=404)

    async def is_ready() -> bool:
        try:
            await probe.seconds()
        except Exception as error:
            log.warning("not ready: %s: %s", type(error).__name__, error)
            return False
        return True

    @get("", "This server", oip.ServerMetadata)
    async def server_metadata() -> Response:
        return _answer(oip.ServerMetadata("plexrank", __version__, EXTENSIONS))

    @get("/health/live", "The process answers", oip.LiveOut)
    async def live() -> Response:
        return _answer(oip.LiveOut(True))

    @get("/health/ready", "A real scoring was done", oip.ReadyState)
    async def ready() -> Response:
        done = await is_ready()
        return _answer(oip.ReadyState(done), 200 if done else 503)

    @versioned("", "A model's tensors", oip.ModelMetadata)
    async def metadata(model: str, version: str | None = None) -> Response:
        check(model, version)
        signature = service.scorer.signature
        versions = [service.pipeline.served.bundle.version]
        inputs, outputs = oip.described(signature.inputs), oip.described(signature.outputs)
        return _answer(oip.ModelMetadata(model, versions, PLATFORM, inputs, outputs))

    @versioned("/ready", "A real scoring of a model was done", oip.ModelReady)
    async def model_ready(model: str, version: str | None = None) -> Response:
        check(model, version)
        done = await is_ready()
        return _answer(oip.ModelReady(model, done), 200 if done else 503)

    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        check(model, version)
        body = await read_body(request, server.limits.body_bytes)
        asked = oip.read(body, request.headers.get(oip.HEADER))
        served = service.pipeline.served
        inputs = as_tensors(asked.tensors, service.scorer.signature, served.bundle.encoder, server.limits)
        seconds = server.limits.timeout_ms / 1e3 if asked.timeout_us is None else asked.timeout_us / 1e6
        deadline = Deadline(seconds, request.scope["plexrank.begin"])

        def finish(outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
            answered = outputs[VERSION].tobytes().decode() if VERSION in outputs else served.bundle.version
            return oip.write(asked, outputs, model, answered)

        content, json_bytes = await server.rankings.follow(partial(service.begin_infer, inputs, deadline, finish))
        if json_bytes is None:
            return Response(content, media_type="application/json")
        headers = {oip.HEADER: str(json_bytes)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    for path, summary in (
        ("/models/{model}/infer", "Score the tensors of one request"),
        ("/models/{model}/versions/{version}/infer", "Score the tensors of one request, by one version"),
    ):
        routes.post(path, summary=summary, openapi_extra=_takes(service, path), responses=_gives(oip.InferOut))(
            _protocol(infer)
        )
    return routes


def as_tensors(
    given: Mapping[str, np.ndarray | list[str]], signature: Signature, encoder: FeatureEncoder, limits: LimitsConfig
) -> dict[str, np.ndarray]:
    """A request's tensors as the signature has them: texts become fingerprints, FP64 what a numeric feature
    makes of it.

    RequestError for too many candidates or texts, or for one that is no id; what else does not fit the scorer refuses.
    """
    n = len(given.get(CANDIDATES, ()))
    if n > limits.items:
        raise RequestError(f"tensor '{CANDIDATES}': {n} items are more than {limits.items}")
    tensors = {}
    for name, values in given.items():
        spec = signature.by_name.get(name)
        feature = None if spec is None else spec.feature
        numeric = feature is not None and feature.kind == "numeric"
        if isinstance(values, list):
            if spec is None or spec.datatype != "INT64" or numeric:
                raise RequestError(f"tensor '{name}' takes no {oip.BYTES}", status=400)
            tensors[name] = fingerprints(ids(values, limits, name))
        elif values.dtype == np.float64 and feature is not None and numeric:
            tensors[name] = encoder.encode_column(name, pa.array(values)).values
        else:
            tensors[name] = values
    return tensors


def _protocol(route: Route) -> Route:
    """The same, its errors as the protocol has them."""

    @wraps(route)
    async def answered(*arguments: Any, **named: Any) -> Response:
        try:
            return await route(*arguments, **named)
        except PlexrankError as error:
            status = status_of(error)
            headers = {"Retry-After": "1"} if status == 503 else None
            return _answer(oip.OipError(str(error)), status, headers)

    return answered


def _answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json", headers=headers)


def _gives(kind: type[Any]) -> dict[int | str, dict[str, Any]]:
    """An answer; the route's own errors as the protocol's, those at the door as problems."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(kind)}}
    if kind is oip.InferOut:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    fault = {"application/json": {"schema": _ref(oip.OipError)}, PROBLEM_TYPE: {"schema": _ref(Problem)}}
    unready = {"application/json": {"schema": {"anyOf": [_ref(kind), _ref(oip.OipError)]}}, **_problem()}
    return {
        200: {"description": "As asked", "content": content},
        **{code: {"description": PROBLEMS[code][1], "content": fault} for code in (400, 401, 403, 404, 408, 413, 415)},
        **{code: {"description": PROBLEMS[code][1], "content": fault} for code in (421, 422, 500, 504)},
        503: {"description": PROBLEMS[503][1], "content": unready},
    }


def _problem() -> dict[str, Any]:
    return {PROBLEM_TYPE: {"schema": _ref(Problem)}}


def _ref(kind: type[Any]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _takes(service: Service, path: str) -> dict[str, Any]:
    """The body of `infer`, with an example of this model's."""
    served = service.pipeline.served
    items = served.catalogue.ids(np.arange(min(3, len(served.catalogue))))
    tensor = {"name": CANDIDATES, "shape": [1, len(items)], "datatype": oip.BYTES, "data": items}
    content = {"application/json": {"schema": _ref(oip.InferIn), "example": {"inputs": [tensor]}}}
    there = path.format(model=served.bundle.name, version=served.bundle.version)
    return {"requestBody": {"required": True, "content": content}, EXAMPLE_PATH: f"/v2{there}"}
