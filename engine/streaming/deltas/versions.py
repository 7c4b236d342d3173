"""What a registry says of its versions, for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.bundle import read_manifest
from engine.errors import BundleError
from engine.streaming.deltas.pointer import Pointer


@dataclass(frozen=True)
class Version:
    """One version. `auc`, `logloss`: of the ranking task, as its manifest says; created: UTC, ISO 8601.

    good: a rollback may go back to it. problem: what keeps it from being served, as far as a glance tells.
    """

    version: str
    created: str | None = None
    parent: str | None = None
    auc: float | None = None
    logloss: float | None = None
    bytes: int = 0
    current: bool = False
    pinned: bool = False
    good: bool = False
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(folder: Path, pointer: Pointer | None) -> Version:
    """The version in `folder`; pointer: to the one that is current."""
    version = folder.name
    current = pointer is not None and pointer.version == version
    pinned = current and pointer is not None and pointer.pinned
    good = pointer is not None and (current or version in pointer.history)
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        return Version(version, current=current, pinned=pinned, good=good, problem=str(error))
    figures = {k: float(v) for k, v in manifest.metrics.items() if isinstance(v, int | float)}
    return Version(
        version,
        created=manifest.created,
        parent=manifest.parent,
        auc=figures.get("auc"),
        logloss=figures.get("logloss"),
        bytes=sum(f.bytes for f in manifest.files.values()),
        current=current,
        pinned=pinned,
        good=good,
        problem=None if manifest.version == version else f"its manifest says version {manifest.version}",
    )
