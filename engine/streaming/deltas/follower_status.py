"""What a follower says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Applied:
    """One delta that the scorer took: bytes on the way, rows, seconds that applying took, and the delta's own times."""

    version: str
    bytes: int
    rows: int
    seconds: float
    created: float
    newest: float


@dataclass(frozen=True)
class FollowerStatus:
    """How a follower stands.

    epoch, sequence: of the chain that is followed, and of the newest delta in the scorer. lag_seconds: age of the
        newest delta that was applied, where others are known to wait; 0 where none does.
    applied, known, stale: deltas that were applied, had been before, or are of a chain that was left. gaps: times that
        something was missing. swaps: bundles loaded. errors: of any kind, last_error the newest one's message.
    trouble: what is wrong now; None where nothing is.
    """

    model: str | None
    version: str | None
    epoch: int
    sequence: int
    pinned: bool
    lag_seconds: float
    applied: int
    known: int
    stale: int
    gaps: int
    swaps: int
    errors: int
    last_error: str | None
    trouble: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
