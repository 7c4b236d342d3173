"""Row deltas: what a learner changed since the version before, and how versions are named.

A chain begins at a bundle. `epoch` grows whenever the chain is begun anew (a rollback, a promotion, a learner that
starts without its checkpoint), so that a delta of a chain that was left cannot be applied by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TableRows:
    """Rows of one table: rows int64 [n], ascending and distinct; values float32 [n, dim], what they are now."""

    rows: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class ItemVectors:
    """Vectors of the retriever's items: ids (text) [m]; values float32 [m, D], as the bundle's encoder makes them."""

    ids: list[str]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Delta:
    """One step of a chain.

    model: the bundle's name. base: the bundle's version. sequence: 1, 2, ... in (base, epoch); `parent` and `version`
    follow from it. created: when it was made; newest: event time of the newest event trained, seconds since 1970.
    tables: the tables of the frozen model (`embedding.weights.<table>` in its state_dict) by name.
    dense: the other entries of its state_dict that changed, by their names there; empty where none did.
    positions: partition -> next offset of the events that are in it.
    """

    model: str
    base: str
    epoch: int
    sequence: int
    created: float
    newest: float
    tables: Mapping[str, TableRows]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: ItemVectors | None = None
    positions: Mapping[int, int] = field(default_factory=dict)

    @property
    def parent(self) -> str:
        return version_of(self.base, self.epoch, self.sequence - 1)

    @property
    def version(self) -> str:
        return version_of(self.base, self.epoch, self.sequence)

    @property
    def row_count(self) -> int:
        return sum(len(t.rows) for t in self.tables.values())


def version_of(base: str, epoch: int, sequence: int) -> str:
    """A bundle's own version before the first delta, then `base+epoch.sequence`."""
    return base if sequence == 0 else f"{base}+{epoch}.{sequence}"
