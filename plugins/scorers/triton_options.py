"""How the gateway reaches Triton: address, TLS, headers, patience. A secret never stands in the configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from engine.components import PluginOptions
from engine.errors import PluginError
from plugins.scorers.inproc import InprocScorer

_HEADER = re.compile(r"^(?!grpc-)[a-z0-9_.-]+(?<!-bin)$")


class Secret(str):
    """A header's value that does not show in the representation of what holds it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class TlsOptions(PluginOptions):
    """PEM files. With `cert` and `key` the gateway shows who it is, for servers that ask."""

    enabled: bool = Field(True, description="false: in the clear, whatever else stands here")
    ca: str | None = Field(None, description="authorities that may have signed the server's certificate; else gRPC's")
    cert: str | None = Field(None, description="this client's certificate")
    key: str | None = Field(None, description="its private key")
    server_name: str | None = Field(
        None, min_length=1, description="the name that the certificate is for, where it is not the one in `url`"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: cert and key belong together")
        return self

    def read(self, name: Literal["ca", "cert", "key"]) -> bytes | None:
        """A file's bytes; PluginError where it cannot be read."""
        path = getattr(self, name)
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise PluginError(f"scorer 'triton': {path} (tls.{name}): {error.strerror}") from error


class HeaderOptions(PluginOptions):
    """Where a header's value comes from: exactly one of `value`, `env` and `file`."""

    value: str | None = Field(None, description="the value itself; not for secrets")
    env: str | None = Field(None, min_length=1, description="environment variable that holds it")
    file: str | None = Field(None, min_length=1, description="file that holds it, in its first line; read anew")
    prefix: str = Field("", description="goes before it, as `Bearer `")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(source is not None for source in (self.value, self.env, self.file)) != 1:
            raise ValueError("a header needs exactly one of value, env and file")
        return self

    def read(self, name: str) -> Secret:
        """PluginError where the variable or the file is missing or empty, or gRPC cannot send it."""
        found, where = self.value, "value"
        if self.env is not None:
            found, where = os.environ.get(self.env, ""), f"the environment variable {self.env}"
        elif self.file is not None:
            where = self.file
            try:
                found = (Path(self.file).read_text("utf-8").splitlines() or [""])[0]
            except (OSError, UnicodeDecodeError) as error:
                raise PluginError(f"scorer 'triton': headers.{name}: {self.file}: {error}") from error
        if not found:
            raise PluginError(f"scorer 'triton': headers.{name}: {where} is empty or not set")
        if not all(" " <= letter <= "~" for letter in self.prefix + found):
            raise PluginError(f"scorer 'triton': headers.{name}: only printable ASCII can be sent")
        return Secret(self.prefix + found)


class BreakerOptions(PluginOptions):
    """When Triton is left alone for a while."""

    failures: int = Field(5, ge=1, description="calls that fail one after another before no more are made")
    pause_s: float = Field(1.0, gt=0, le=600, description="between the attempts, aside of requests, to come back")
    least_ms: float = Field(
        20.0, ge=0, description="a call that had less time than this and ran out of it is not held against Triton"
    )


class TritonOptions(PluginOptions):
    """Options of the scorer `triton`."""

    url: str = Field(
        "127.0.0.1:8001",
        description="host:port of Triton's gRPC, or dns:///host:port: all addresses of that name share the calls",
    )
    model: str | None = Field(None, min_length=1, description="its name there; default: the bundle's")
    tls: TlsOptions | None = Field(None, description="encrypts; null: in the clear")
    headers: dict[str, HeaderOptions] = Field(
        default_factory=dict, description="sent along with each call: name -> value, env or file, with a prefix"
    )
    fallback: Literal["inproc", "none"] = Field(
        "inproc", description="inproc: a copy of the model here scores while Triton does not; none: no copy is held"
    )
    inproc: InprocScorer.Options = Field(
        default_factory=InprocScorer.Options, description="options of that copy, those of the scorer `inproc`"
    )
    metrics_url: str | None = Field(
        None,
        pattern=r"^http://[^\s/@]+/\S*$",
        description="of Triton's metrics, as http://127.0.0.1:8002/metrics: shown with the server's own at /metrics",
    )
    load_timeout_s: float = Field(60.0, gt=0, le=3600, description="how long a bundle is waited for to be in Triton")
    timeout_ms: float = Field(100.0, gt=0, le=60_000, description="of a call for a request without a deadline")
    keepalive_s: float = Field(
        330.0, ge=0, description="idle time after which the connection is tried; servers want 300 at least; 0: never"
    )
    breaker: BreakerOptions = BreakerOptions()

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        address = re.sub(r"^dns://[^/]*/", "", url)
        host, _, port = address.rpartition(":")
        if not (url.startswith("unix:") or (re.fullmatch(r"[^/\s]+", host) and port.isdecimal() and int(port) < 65536)):
            raise ValueError(f"'{url}': write host:port of Triton's gRPC service, such as 127.0.0.1:8001")
        return url

    @field_validator("headers")
    @classmethod
    def _names(cls, headers: dict[str, HeaderOptions]) -> dict[str, HeaderOptions]:
        for name in headers:
            if not _HEADER.match(name):
                raise ValueError(
                    f"'{name}': a header's name is lower case a-z, 0-9, '_', '.', '-'; not grpc-, not -bin"
                )
        return headers
