"""Vectors of the request's features that were made a moment ago: hours, devices, users who stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.tables import FrozenTables

MOST = 8192
"""Values of each feature whose vectors are kept."""


class RecentVectors:
    """feature and its ids -> vector [1, width]. Safe from many threads without a lock: `without` gives another one.

    A reader that began before rows were changed may still enter a vector of the old ones, into what it began with.
    """

    def __init__(self, kept: Mapping[str, dict[bytes, Tensor]] | None = None) -> None:
        self._kept: dict[str, dict[bytes, Tensor]] = dict(kept or {})

    def of(self, ids: Mapping[str, np.ndarray], make: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> list[Tensor]:
        """feature -> its ids int64 [n] gives its vectors, in that order. `make` gets the features that are not kept."""
        kept = self._kept
        keys = {name: values.tobytes() for name, values in ids.items()}
        found = {name: kept.get(name, {}).get(key) for name, key in keys.items()}
        new = [name for name, vector in found.items() if vector is None]
        if new:
            made = make(new)
            for name in new:
                found[name] = vector = made[name].clone()
                its = kept.get(name)
                if its is None or len(its) >= MOST:
                    its = kept[name] = {}  # other threads go on with the one before
                its[keys[name]] = vector
        return [vector for vector in found.values() if vector is not None]

    def without(self, changed: Mapping[str, np.ndarray], embedding: FrozenTables) -> RecentVectors:
        """All but those that read one of these rows. changed: table -> rows int64 [n], ascending."""
        left = {}
        for name, its in list(self._kept.items()):  # readers may enter a feature meanwhile
            rows = changed.get(embedding.placements[name].table.name)
            left[name] = its if rows is None else _without(name, its, rows, embedding)
        return RecentVectors(left)


def _without(name: str, its: dict[bytes, Tensor], rows: np.ndarray, embedding: FrozenTables) -> dict[bytes, Tensor]:
    left = dict(its)
    keys = list(left)
    ids = np.frombuffer(b"".join(keys), dtype=np.int64)
    if not len(ids) or not len(rows):
        return left
    with torch.inference_mode():
        read = embedding.placer({name: torch.from_numpy(ids.copy())})[name].numpy()
    at = np.minimum(np.searchsorted(rows, read), len(rows) - 1)
    hit = (rows[at] == read).reshape(len(ids), -1).any(axis=1)
    lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys)) // ids.itemsize
    for key in np.unique(np.repeat(np.arange(len(keys)), lengths)[hit]).tolist():
        del left[keys[key]]
    return left
