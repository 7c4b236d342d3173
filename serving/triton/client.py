"""What the launcher and a deployment ask of a Triton, over gRPC; its errors come with Triton's own reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from engine.errors import PlexrankError

try:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException, np_to_triton_dtype
except ImportError as error:
    raise PlexrankError(f"the client of Triton is not installed ({error}): pip install 'plexrank[triton]'") from None

CONTROL = "PLEXRANK_TRITON_CONTROL"
"""Environment variable: the secret without which a server that others reach lets nobody load models."""
CONTROL_KEY = "plexrank-control"
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # what one attempt may take, on a busy machine too
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_HERE = ("127.", "localhost:", "[::1]:", "unix:")


class TritonError(PlexrankError):
    """Triton refuses, fails or does not answer. `code`: gRPC's, such as UNAVAILABLE."""

    def __init__(self, detail: str, code: str = "UNKNOWN") -> None:
        super().__init__(detail)
        self.code = code

    @property
    def silent(self) -> bool:
        """It did not answer at all, or not in time."""
        return self.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


@dataclass(frozen=True)
class Listed:
    """One version of a model in the index; state READY, UNAVAILABLE, LOADING, UNLOADING, or nothing if never loaded."""

    model: str
    version: str
    state: str
    reason: str


class TritonClient:
    """A connection to one server; may be used by several threads. All calls raise TritonError."""

    def __init__(self, url: str, control: str | None = None) -> None:
        """url: host:port of gRPC; control: the secret, by default the environment's."""
        self.url = url
        here = [("grpc.enable_http_proxy", 0)] if url.startswith(_HERE) else []
        self._client = triton.InferenceServerClient(url, channel_args=[*_CHANNEL, *here])
        secret = os.environ.get(CONTROL) if control is None else control
        self._control = {f"triton-grpc-protocol-{CONTROL_KEY}": secret} if secret else None

    def live(self, timeout: float = 5.0) -> bool:
        """Whether a server answers there."""
        try:
            return bool(self._ask(self._client.is_server_live, client_timeout=timeout))
        except TritonError as error:
            if error.silent:
                return False
            raise

    def ready(self, model: str, version: str = "", timeout: float = 5.0) -> bool:
        """By Triton's word, which it also gives for a model whose process is dead."""
        return bool(self._ask(self._client.is_model_ready, model, version, client_timeout=timeout))

    def server_version(self, timeout: float = 5.0) -> str:
        """Such as `2.51.0`."""
        return str(self._ask(self._client.get_server_metadata, client_timeout=timeout).version)

    def versions(self, model: str, timeout: float = 5.0) -> list[str]:
        """Those that are ready, the oldest first."""
        return list(self._ask(self._client.get_model_metadata, model, client_timeout=timeout).versions)

    def index(self, timeout: float = 5.0) -> list[Listed]:
        """All models of the repository."""
        found = self._ask(self._client.get_model_repository_index, headers=self._control, client_timeout=timeout)
        return [Listed(m.name, m.version, m.state, m.reason) for m in found.models]

    def load(self, model: str, timeout: float = 300.0) -> None:
        """Reads its folder again: versions that are new or changed are loaded, then take over; others stay."""
        self._ask(self._client.load_model, model, headers=self._control, client_timeout=timeout)

    def unload(self, model: str, timeout: float = 60.0) -> None:
        """All its versions: from now on requests for it fail."""
        self._ask(self._client.unload_model, model, headers=self._control, client_timeout=timeout)

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], version: str = "", timeout: float | None = None
    ) -> dict[str, np.ndarray]:
        """inputs: 1-d arrays [n], sent as one request [1, n] -> outputs as 1-d arrays. timeout: seconds."""
        asked = []
        for name, array in inputs.items():
            row = np.ascontiguousarray(array).reshape(1, -1)
            asked.append(triton.InferInput(name, list(row.shape), np_to_triton_dtype(row.dtype)))
            asked[-1].set_data_from_numpy(row)
        answer = self._ask(self._client.infer, model, asked, version, client_timeout=timeout)
        names = [output.name for output in answer.get_response().outputs]
        with _said(self.url):
            return {name: answer.as_numpy(name).reshape(-1) for name in names}

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with _said(self.url):
            return function(*arguments, **named)


@contextmanager
def _said(url: str) -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        code = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
        if CONTROL_KEY in str(error.message()):  # which Triton calls UNAVAILABLE
            raise TritonError(f"{url}: only with the server's secret: set {CONTROL}", "PERMISSION_DENIED") from None
        raise TritonError(f"{url}: {error.message()}", code) from None
    except (ValueError, TypeError) as error:  # from set_data_from_numpy, and as_numpy of an answer that does not add up
        raise TritonError(f"{url}: {error}", "INVALID_ARGUMENT") from error
