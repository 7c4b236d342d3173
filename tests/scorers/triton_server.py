"""A gRPC server that speaks as Triton does, over scorers in this process; it can be slow, wrong, gone and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from engine.components import ScoreRequest
from engine.errors import RequestError
from engine.inference.signature import DTYPES
from plugins.scorers.inproc import InprocScorer

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TritonLike(pb_grpc.GRPCInferenceServiceServicer):
    """Versions of one model, a scorer each; what is asked is kept.

    before: runs first in each inference and may sleep or abort; spoil: changes each answer; absent: how a
    version is refused that is not there.
    """

    def __init__(self, model: str, bundles: dict[str, Path], credentials: Any = None) -> None:
        self.model = model
        self.scorers: dict[str, InprocScorer] = {}
        for version, bundle in bundles.items():
            self.scorers[version] = InprocScorer(InprocScorer.Options())
            self.scorers[version].load(bundle)
        self.before: Callable[[Any], None] = lambda context: None
        self.spoil: Callable[[Any], None] = lambda response: None
        self.absent = (grpc.StatusCode.NOT_FOUND, "is not found")
        self.asked: list[tuple[str, dict[str, np.ndarray]]] = []  # (version, tensors)
        self.metadata: list[dict[str, Any]] = []
        self.remaining: list[float] = []
        self.port = 0
        self._credentials = credentials
        self._server: Any = None
        self.start()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    # -------------------------------------------------------------------------------------------- on and off
    def start(self) -> None:
        """At the port that it had before, or at any."""
        server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        address = f"127.0.0.1:{self.port}"
        until = time.monotonic() + 10
        while True:
            try:
                if self._credentials is None:
                    self.port = server.add_insecure_port(address)
                else:
                    self.port = server.add_secure_port(address, self._credentials)
                break
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Connections are cut."""
        if self._server is not None:
            self._server.stop(None).wait(10)
            self._server = None

    # ------------------------------------------------------------------------------------------------- calls
    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if request.name != self.model:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return pb.ModelMetadataResponse(name=self.model, versions=sorted(self.scorers), platform="python")

    def ModelInfer(self, request: Any, context: Any) -> Any:
        tensors = {
            spec.name: np.frombuffer(raw, DTYPES[spec.datatype]).copy()
            for spec, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        for spec in request.inputs:
            assert list(spec.shape) == [1, len(tensors[spec.name])]
        self.asked.append((request.model_version, tensors))
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining.append(context.time_remaining())
        self.before(context)
        newest = max(self.scorers, key=int, default="")
        scorer = self.scorers.get(request.model_version or newest)
        if scorer is None:
            code, words = self.absent
            context.abort(code, f"Request for unknown model: '{self.model}' version {request.model_version} {words}")
        try:
            answer = scorer.infer(tensors)
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = pb.ModelInferResponse(model_name=self.model, model_version=request.model_version)
        for name, values in answer.items():
            response.outputs.add(name=name, datatype=_NAMES[values.dtype], shape=(1, len(values)))
            response.raw_output_contents.append(values.tobytes())
        self.spoil(response)
        return response

    def forget(self) -> None:
        """What was asked so far."""
        self.asked.clear()
        self.metadata.clear()
        self.remaining.clear()


def abort(code: grpc.StatusCode, details: str = "") -> Callable[[Any], None]:
    return lambda context: context.abort(code, details)


def request(n: int, **more: Any) -> ScoreRequest:
    """For the first n films of the tiny bundle, and beyond them unknown ones."""
    return ScoreRequest({"user_id": "u3"}, {"item_id": ["4", "9"]}, [str(k) for k in range(n)], **more)
