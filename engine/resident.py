"""Which files of a bundle are read into memory, and which are mapped."""

from __future__ import annotations

from pathlib import Path

RESIDENT = 256 << 20
"""Bytes. A larger file is mapped: shared by processes and quick to open, but who writes over it in place changes the
numbers under the process, or kills it. A smaller one is read, and nothing of that can happen."""


def resident(path: Path) -> bool:
    """Whether a file is small enough to be read. OSError where there is none."""
    return path.stat().st_size <= RESIDENT
