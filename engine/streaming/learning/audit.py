"""Which example was trained at which step, so that anybody can count that each was trained once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engine.errors import CheckpointError
from engine.streaming.join.ready import Examples

RECORD = np.dtype([("step", "<i8"), ("request", "<i8"), ("item", "<i8"), ("kind", "i1")])
"""`np.fromfile(path, RECORD)` reads an audit: step from 0, fingerprints of request and item, kind as in `Emitted`."""


class Audit:
    """A file with a record an example. Its length is part of each checkpoint, and what stands behind it is cut off
    when the checkpoint is taken up: those steps are done again."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """CheckpointError where the file is shorter than `length`: it is not the one of the checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if self._file.seek(0, os.SEEK_END) < length:
            raise CheckpointError(f"{path}: shorter than when the checkpoint was written; give --audit the same file")
        self._file.truncate(length)
        self._file.seek(length)
        self.length = length

    def write(self, step: int, examples: Examples) -> None:
        records = np.empty(len(examples), RECORD)
        records["step"], records["kind"] = step, examples.kind
        records["request"], records["item"] = examples.request, examples.item
        self._file.write(records.tobytes())
        self.length += records.nbytes

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
