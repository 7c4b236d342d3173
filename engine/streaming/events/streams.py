"""The streams of one log."""

from __future__ import annotations

from typing import Any

STREAMS: dict[str, dict[str, Any]] = {
    "dead": {},
    "examples": {},
    "deltas": {"partitions": 1},
    "models": {"partitions": 1, "compact": True},
}
"""Streams beside the log -> how they are made. Deltas follow one another, so they have one partition, and all of them
are needed; of the pointer to the served bundle only the newest is."""
