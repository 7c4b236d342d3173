"""What a following process writes down for others to see; read without torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import PlexrankError
from engine.files import write_whole
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.layout import CONFIG, follow_status, live_root

SECONDS = 1.0
"""Between two writings."""


@dataclass(frozen=True)
class FollowStatus:
    """number: of the version in Triton that takes deltas; version: what it scores with.

    newest: event time of the newest event in it; None before the first delta. rows: of the tables, written since the
    process began. trouble: what is wrong now.
    """

    model: str
    number: int | None
    version: str | None
    newest: float | None
    applied: int
    rows: int
    swaps: int
    gaps: int
    errors: int
    lag_seconds: float
    last_error: str | None
    trouble: str | None

    def write(self, live: Path) -> None:
        """Into a live folder. OSError where it cannot be written."""
        live.mkdir(parents=True, exist_ok=True)
        held = {**asdict(self), "pid": os.getpid(), "written": time.time()}
        write_whole(follow_status(live, self.model), json.dumps(held).encode(), durable=False)


def followed(repository: Path) -> list[dict[str, Any]]:
    """Of each model of the repository that is, or was, followed: `FollowStatus`, pid, `written`, and as of now
    `silent_seconds` and `age_seconds`, None where no event is in it."""
    found: dict[str, dict[str, Any]] = {}
    now = time.time()
    for path in sorted(path for live in _live_roots(repository) for path in live.glob(follow_status(live, "*").name)):
        try:
            held = json.loads(path.read_bytes())
            newest = held["newest"]
            held["silent_seconds"] = round(max(0.0, now - held["written"]), 3)
            held["age_seconds"] = None if newest is None else round(max(0.0, now - newest), 3)
            found[held["model"]] = held
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return list(found.values())


def _live_roots(repository: Path) -> set[Path]:
    """Where a status may be: also before the first version is there."""
    roots = {live_root(repository)}
    for config in repository.glob(f"*/{CONFIG}"):
        with suppress(PlexrankError):
            roots.add(live_root(repository, ModelConfig.read(config).settings.live))
    return roots
