"""Which rows of which table an id reads: rows of its own, or hashed ones.

A method says for each feature where its ids live (`Own`, `Hashed`); `Placer` turns the ids of a whole batch into rows
with a fixed number of tensor operations, whatever the number of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.hashing import mix, seed_of


@dataclass(frozen=True)
class Table:
    """One table of parameters: float32 [rows, dim]."""

    name: str
    rows: int
    dim: int


@dataclass(frozen=True, eq=False)
class Own:
    """Each known id has a row of its own; unknown ids share the table's first `unknown_rows` rows.

    fingerprints: int64 [V], sorted and distinct; id i of them has row `unknown_rows + i`.
    """

    table: Table
    space: str
    fingerprints: np.ndarray
    unknown_rows: int = 1
    lookups: int = 1


@dataclass(frozen=True)
class Hashed:
    """`lookups` rows an id, each by its own hash of the table's rows; the seeds come from the space's name."""

    table: Table
    space: str
    lookups: int = 1


Placement = Own | Hashed


class Placer(nn.Module):
    """Fingerprints of many features to rows, all features of one kind of placement in one pass."""

    def __init__(self, placements: Mapping[str, Placement]) -> None:
        super().__init__()
        self._slot: dict[str, tuple[str, int]] = {}
        groups: dict[str, list[tuple[str, Placement]]] = {}
        for feature, placement in placements.items():
            key = "own" if isinstance(placement, Own) else f"hashed{placement.lookups}"
            self._slot[feature] = (key, len(groups.setdefault(key, [])))
            groups[key].append((feature, placement))
        self.maps = nn.ModuleDict()
        for key, members in groups.items():
            chosen = [p for _, p in members]
            own = [p for p in chosen if isinstance(p, Own)]
            self.maps[key] = Vocabularies(own) if own else HashedRows([p for p in chosen if isinstance(p, Hashed)])

    def forward(self, prints: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> fingerprints int64 [n] gives feature -> rows int64 [n * lookups], an id's lookups together."""
        grouped: dict[str, list[str]] = {}
        for feature in prints:
            grouped.setdefault(self._slot[feature][0], []).append(feature)
        rows: dict[str, Tensor] = {}
        for key, features in grouped.items():
            parts = [prints[f] for f in features]
            counts = [len(p) for p in parts]
            slots = torch.tensor([self._slot[f][1] for f in features], device=parts[0].device)
            slot_of_value = slots.repeat_interleave(
                torch.tensor(counts, device=parts[0].device), output_size=sum(counts)
            )
            found = self.maps[key](torch.cat(parts) if len(parts) > 1 else parts[0], slot_of_value)
            width = found.shape[1]
            rows.update(zip(features, found.reshape(-1).split([c * width for c in counts]), strict=True))
        return rows


class HashedRows(nn.Module):
    """murmur3's finaliser of fingerprint and seed, reduced to the table's rows."""

    seeds: Tensor
    moduli: Tensor

    def __init__(self, placements: Sequence[Hashed]) -> None:
        super().__init__()
        seeds = [[seed_of(p.space, j) for j in range(p.lookups)] for p in placements]
        self.register_buffer("seeds", _tensor(seeds), persistent=False)
        self.register_buffer("moduli", _tensor([[p.table.rows] for p in placements]), persistent=False)

    def forward(self, prints: Tensor, slot: Tensor) -> Tensor:
        """prints int64 [n], slot int64 [n] (whose placement) -> rows int64 [n, lookups]."""
        return torch.remainder(mix(prints[:, None], self.seeds[slot]), self.moduli[slot])


class Vocabularies(nn.Module):
    """Exact search of fingerprints in several sorted vocabularies at once.

    Fingerprints are spread evenly, so their leading bits name a bucket of about one entry, and a few steps of binary
    search end the work: two or three cache misses an id where a search of the whole vocabulary takes its logarithm.
    """

    prints: Tensor
    starts: Tensor
    slots: Tensor

    def __init__(self, placements: Sequence[Own]) -> None:
        super().__init__()
        distinct: dict[tuple[str, int], int] = {}
        prints: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        rows: list[list[int]] = []
        entries = buckets = widest = 0
        for p in placements:
            key = (p.space, p.unknown_rows)
            if key not in distinct:
                known = np.ascontiguousarray(p.fingerprints, dtype=np.int64)
                bits = max(1, len(known).bit_length())
                fill = np.bincount(_bucket(known, bits), minlength=1 << bits)
                begin = np.concatenate([[0], np.cumsum(fill)]) + entries
                distinct[key] = len(rows)
                rows.append([64 - bits, 1 << (bits - 1), buckets, p.unknown_rows - entries, p.unknown_rows,
                             seed_of(p.space)])  # fmt: skip
                prints.append(known)
                starts.append(begin)
                entries += len(known)
                buckets += len(begin)
                widest = max(widest, int(fill.max()))
        self._steps = widest.bit_length()
        of_placement = [rows[distinct[(p.space, p.unknown_rows)]] for p in placements]
        self.register_buffer("prints", _tensor(np.concatenate([*prints, [0]])), persistent=False)
        self.register_buffer("starts", _tensor(np.concatenate(starts)), persistent=False)
        self.register_buffer("slots", _tensor(of_placement), persistent=False)

    def forward(self, prints: Tensor, slot: Tensor) -> Tensor:
        """prints int64 [n], slot int64 [n] -> rows int64 [n, 1]."""
        shift, half, base, offset, unknown_rows, seed = self.slots[slot].unbind(1)
        bucket = (prints >> shift) + half + base
        low, high = self.starts[bucket], self.starts[bucket + 1]
        end = high
        for _ in range(self._steps):
            middle = (low + high) >> 1
            right = (self.prints[middle] < prints) & (low < high)
            low = torch.where(right, middle + 1, low)
            high = torch.where(right, high, middle)
        known = (low < end) & (self.prints[low] == prints)
        unknown = torch.remainder(mix(prints, seed), unknown_rows)
        return torch.where(known, low + offset, unknown)[:, None]


def _bucket(prints: np.ndarray, bits: int) -> np.ndarray:
    return (prints >> (64 - bits)) + (1 << (bits - 1))


def _tensor(values: object) -> Tensor:
    """int64, always real memory, also where modules are being made on the meta device."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
