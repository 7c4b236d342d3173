"""The pointer to the bundle that is served: a small JSON record, in the registry and on the stream `models`."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec

from engine.errors import BundleError

MOST_BYTES = 1 << 18
MOST_HISTORY = 100

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
_Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which bundle is served, and since when.

    epoch: of the chain of deltas that may follow; a delta of a smaller one is not applied. path: of the bundle,
        relative to the registry. sha256: of its manifest. created: seconds since 1970.
    pinned: no bundle and no delta may follow. positions: of the stream `deltas` named `stream`, from which the chain
        goes on. history: versions that were current before, oldest first, that a rollback may go back to.
    registry: names the registry that gave the epoch out; those of another one mean nothing beside it.
    """

    model: _Name
    version: _Version
    epoch: _Count
    path: Annotated[str, msgspec.Meta(max_length=200)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    created: float
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    pinned: bool = False
    positions: dict[int, _Count] = {}
    stream: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    history: Annotated[list[_Version], msgspec.Meta(max_length=MOST_HISTORY)] = []
    registry: Annotated[str, msgspec.Meta(max_length=64)] = ""

    def follows(self, other: Pointer) -> bool:
        """Whether it was set after another one of the same registry."""
        same = self.registry != "" and (self.registry, self.model) == (other.registry, other.model)
        return same and (self.epoch, self.created) > (other.epoch, other.created)

    def encoded(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        return found


def decode_pointer(raw: bytes, where: str) -> Pointer:
    """BundleError naming `where` for what is no pointer."""
    if len(raw) > MOST_BYTES:
        raise BundleError(f"{where}: {len(raw):,} bytes; a pointer has at most {MOST_BYTES:,}")
    try:
        pointer = msgspec.json.decode(raw, type=Pointer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: no pointer to a bundle: {error}; promote a version to write it anew") from None
    if not math.isfinite(pointer.created) or pointer.path != f"{pointer.model}/{pointer.version}":
        raise BundleError(f"{where}: leads to '{pointer.path}', not to {pointer.model}/{pointer.version}")
    return pointer
