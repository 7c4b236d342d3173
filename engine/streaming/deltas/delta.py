"""Row deltas: what a learner changed since the version before, and how versions are named.

A chain begins at a bundle. `epoch` grows whenever the chain is begun anew (a rollback, a promotion, a learner that
starts without its checkpoint), so that a delta of a chain that was left cannot be applied by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from engine.errors import DeltaGap


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
    follows: the sequence that it is made on; None: the one before its own. Of several merged, what the first follows.
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
    follows: int | None = None

    @property
    def after(self) -> int:
        """The sequence that it is made on."""
        return self.sequence - 1 if self.follows is None else self.follows

    @property
    def parent(self) -> str:
        return version_of(self.base, self.epoch, self.after)

    @property
    def version(self) -> str:
        return version_of(self.base, self.epoch, self.sequence)

    @property
    def row_count(self) -> int:
        return sum(len(t.rows) for t in self.tables.values())


def version_of(base: str, epoch: int, sequence: int) -> str:
    """A bundle's own version before the first delta, then `base+epoch.sequence`."""
    return base if sequence == 0 else f"{base}+{epoch}.{sequence}"


def parsed(version: str) -> tuple[str, int, int]:
    """`version_of` backwards: (base, epoch, sequence); (version, 0, 0) for a bundle's own."""
    base, plus, chain = version.partition("+")
    epoch, dot, sequence = chain.partition(".")
    if plus and not (dot and epoch.isdecimal() and sequence.isdecimal()):
        raise DeltaGap(f"'{version[:100]}' is no version; one is a bundle's, or base+epoch.sequence")
    return (base, int(epoch), int(sequence)) if plus else (version, 0, 0)


def standing(delta: Delta, version: str) -> Literal["next", "known", "gap"]:
    """Whether a delta can be applied to what is at `version`.

    known: it is in there already. next: it follows; of a merged one a part may be in there already, which does no harm,
    as rows carry what they are now. gap: another base or epoch, or a delta between the two is missing.
    """
    base, epoch, sequence = parsed(version)
    if delta.base != base or (sequence > 0 and delta.epoch != epoch):
        return "gap"
    if delta.sequence <= sequence:
        return "known"
    return "next" if delta.after <= sequence else "gap"


def merge(first: Delta, *more: Delta) -> Delta:
    """One delta in place of some that follow each other: of a row in several, the last one's values.

    DeltaGap where one does not follow the one before it.
    """
    deltas = [first, *more]
    for one, two in pairwise(deltas):
        if one.model != two.model or standing(two, one.version) != "next":
            raise DeltaGap(f"{two.model} {two.version} does not follow {one.model} {one.version}")
    names = sorted({name for d in deltas for name in d.tables})
    times = [d.newest for d in deltas if not math.isnan(d.newest)]
    return replace(
        deltas[-1],
        newest=max(times, default=math.nan),
        tables={name: _merged_rows([d.tables[name] for d in deltas if name in d.tables]) for name in names},
        dense={name: tensor for d in deltas for name, tensor in d.dense.items()},
        vectors=_merged_vectors([d.vectors for d in deltas if d.vectors is not None]),
        positions={p: offset for d in deltas for p, offset in d.positions.items()},
        follows=first.after,
    )


def _merged_rows(parts: list[TableRows]) -> TableRows:
    if len(parts) == 1:
        return parts[0]
    rows, places = _latest(np.concatenate([p.rows for p in parts]))
    return TableRows(rows, np.concatenate([p.values for p in parts])[places])


def _merged_vectors(parts: list[ItemVectors]) -> ItemVectors | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    ids, places = _latest(np.array([item for p in parts for item in p.ids], dtype=object))
    return ItemVectors(ids.tolist(), np.concatenate([p.values for p in parts])[places])


def _latest(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys in order, and the last place of each."""
    distinct, places = np.unique(keys[::-1], return_index=True)
    return distinct, len(keys) - 1 - places
