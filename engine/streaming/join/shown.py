"""What the pending store tells the join of the rankings that it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Shown:
    """The impressions of r rankings, ranking by ranking.

    slot int64 [n]: the row of each in the pending store. item int64 [n]: fingerprints. offsets int64 [r + 1].
    refused: ranking -> why its features cannot be read; it has no impressions and is not joined.
    """

    slot: np.ndarray
    item: np.ndarray
    offsets: np.ndarray
    refused: Mapping[int, str] = field(default_factory=dict)
