"""A permutation of any number of rows that is computed where it is needed: no array of all rows, any step at once."""

from __future__ import annotations

import numpy as np

from engine.hashing import fingerprint

ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A bijection of [0, rows), fixed by the seed: a Feistel network over the next power of four, walked until it
    lands inside (Black and Rogaway 2002, cycle walking: fewer than four steps a row on average)."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self._half = np.uint64(max(1, -(-max(rows - 1, 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(fingerprint(f"shuffle:{seed}:{i}") & 0xFFFFFFFFFFFFFFFF) for i in range(ROUNDS)]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 [n] places in the shuffled order -> int64 [n] what stands there."""
        out = self._once(places.astype(np.uint64))
        outside = np.flatnonzero(out >= self.rows)
        while len(outside):
            out[outside] = self._once(out[outside])
            outside = outside[out[outside] >= self.rows]
        return out.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            mixed = (right ^ key) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & self._mask)
        return (left << self._half) | right
