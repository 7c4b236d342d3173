"""Which impressions stay where only a share of the negatives is trained."""

from __future__ import annotations

import numpy as np


def uniform(request: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each impression, float64 [n]; the same on every machine (murmur3's finaliser, twice)."""
    mixed = finalised(request.view(np.uint64) ^ np.uint64(seed % 2**64))
    return (finalised(mixed ^ item.view(np.uint64)) >> np.uint64(11)) * 2.0**-53


def finalised(h: np.ndarray) -> np.ndarray:
    """murmur3's finaliser of uint64 [n]."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> np.uint64(33))) * np.uint64(multiplier)
    return h ^ (h >> np.uint64(33))
