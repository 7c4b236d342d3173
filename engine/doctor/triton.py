"""Whether Triton can be used: a server that answers, the package that carries one, and its client."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from engine.data.cache import default_cache
from engine.doctor.address import address
from engine.doctor.finding import Finding

BINARY = Path("pytriton/tritonserver/bin/tritonserver")
"""The server in the folder that the wheel is installed into."""
_INSTALL = "plexrank triton install"
_CLIENT = "pip install 'plexrank[triton]'"


def wheel_folder() -> Path:
    """`PLEXRANK_TRITON`, else `triton` in plexrank's cache."""
    return Path(os.environ.get("PLEXRANK_TRITON") or default_cache() / "triton")


def examine_triton(url: str, timeout: float) -> Finding:
    """url: of a server, or nothing; timeout: seconds that it has to answer."""
    client = importlib.util.find_spec("tritonclient") is not None
    if not url:
        return _installed(client)
    remedy = (
        "plexrank triton up REPOSITORY, or point TRITON_URL at the HTTP port (8000) or gRPC port (8001) of a Triton"
    )
    try:
        if url.startswith(("http://", "https://")):
            with urllib.request.urlopen(f"{url.rstrip('/')}/v2/health/ready", timeout=timeout):  # noqa: S310
                said = f"{url} is ready"
        else:
            socket.create_connection(address(url, 8001), timeout=timeout).close()
            said = f"{url} takes connections"
    except urllib.error.HTTPError as error:
        return Finding("triton", "warn", f"{url} answers {error.code}: not ready", remedy)
    except (OSError, ValueError) as error:
        return Finding("triton", "warn", f"{url} is not reachable: {getattr(error, 'reason', error)}", remedy)
    if not client:
        return Finding("triton", "warn", f"{said}, but its client is not installed", _CLIENT)
    return Finding("triton", "ok", said)


def _installed(client: bool) -> Finding:
    folder = wheel_folder()
    scoring = "scoring runs in process (set TRITON_URL=http://host:8000)"
    if not (folder / BINARY).is_file():
        return Finding("triton", "info", f"not configured; {scoring}; no server of our own: {_INSTALL} brings one")
    if not client:
        return Finding("triton", "info", f"a server is in {folder}, its client is not installed", _CLIENT)
    return Finding("triton", "info", f"not configured; {scoring}; `plexrank triton up` starts the one in {folder}")
