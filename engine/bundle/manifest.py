"""The manifest: what a bundle says of itself, checked before anything else of it is touched."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.config import NAME
from engine.errors import BundleError

FORMAT = 1
MAX_BYTES = 4 << 20
MAX_FILES = 1024
LIBRARIES = ("plexrank", "torch", "torchrec", "fbgemm-gpu", "numpy", "pyarrow", "safetensors", "scikit-learn")

_PART = re.compile(r"[a-z0-9_][a-z0-9._-]{0,63}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Strict):
    """What a file must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class PluginEntry(_Strict):
    """A component that made the model, and the distribution it came from."""

    kind: str
    name: str
    distribution: str
    version: str


class Manifest(_Strict):
    """`version` names the contents (files, configuration, plugins); `digest` is the sha256 of all the rest of this."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    created: str = Field(description="UTC, ISO 8601")
    config: dict[str, Any]
    schema_: dict[str, Any] = Field(alias="schema")
    seed: int
    plugins: list[PluginEntry]
    libraries: dict[str, str]
    metrics: dict[str, Any]
    parent: str | None = None
    files: dict[str, FileEntry] = Field(max_length=MAX_FILES)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    def as_json(self) -> dict[str, Any]:
        """The object in the file."""
        return self.model_dump(mode="json", by_alias=True)


def content_version(
    files: dict[str, FileEntry], config: dict[str, Any], schema: dict[str, Any], plugins: list[PluginEntry]
) -> str:
    """The first twelve hex digits of a sha256 over what scores: equal contents have equal versions on any machine."""
    parts: dict[str, Any] = {"config": config, "schema": schema}
    parts["files"] = {name: entry.sha256 for name, entry in files.items()}
    parts["plugins"] = [p.model_dump() for p in plugins]
    return hashlib.sha256(_canonical(parts)).hexdigest()[:12]


def sealed(fields: dict[str, Any]) -> Manifest:
    """A manifest with its digest."""
    body = Manifest.model_validate({"format": FORMAT, **fields, "digest": "0" * 64}).as_json()
    del body["digest"]
    return Manifest.model_validate({**body, "digest": hashlib.sha256(_canonical(body)).hexdigest()})


def read_manifest(bundle: Path) -> Manifest:
    """Reads and checks `manifest.json`: size, JSON, format, fields, digest and the names of the files.

    Raises BundleError naming the bundle and what is wrong.
    """
    path = bundle / "manifest.json"
    try:
        if not bundle.is_dir():
            raise BundleError(f"{bundle}: no such bundle (a folder with a manifest.json)")
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{bundle}: not a bundle: it has no manifest.json")
        if path.stat().st_size > MAX_BYTES:
            raise BundleError(f"{path}: {path.stat().st_size:,} bytes; a manifest has at most {MAX_BYTES:,}")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: not JSON; the file is truncated or corrupted, copy the bundle again") from None
    if not isinstance(raw, dict):
        raise BundleError(f"{path}: not a manifest: a JSON object is wanted")
    if raw.get("format") != FORMAT:
        raise BundleError(
            f"{path}: bundle format {raw.get('format')!r}, this plexrank reads {FORMAT}; "
            "train again, or use the plexrank that wrote it"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}") from None
    for name in manifest.files:
        inside(bundle, name)
    raw.pop("digest")
    if hashlib.sha256(_canonical(raw)).hexdigest() != manifest.digest:
        raise BundleError(f"{path}: edited: it does not fit its own digest; copy the bundle again or train again")
    return manifest


def inside(bundle: Path, name: str) -> Path:
    """The path of a manifest's file, or BundleError for a name that could lead out of the bundle.

    Parts are lower-case letters, digits, `._-`, at most 64; no `..`, no absolute path, no link on the way.
    """
    parts = name.split("/")
    if not (1 <= len(parts) <= 8 and all(_PART.fullmatch(part) for part in parts)):
        raise BundleError(f"{bundle}: refused file name {name[:200]!r} in the manifest")
    path = bundle
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{bundle}: {name}: a symbolic link; a bundle holds plain files only")
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle}: {name}: leads out of the bundle")
    return path


def library_versions() -> dict[str, str]:
    """The versions of what scoring rests on, as installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
