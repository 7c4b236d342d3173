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

    @property
    def stored(self) -> int:
        """Numbers a row takes while it is trained: TorchRec's kernels want a multiple of four. The rest stay zero."""
        return -(-self.dim // 4) * 4


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
            values = torch.cat(parts) if len(parts) > 1 else parts[0]
            slots = torch.tensor([self._slot[f][1] for f in features], device=values.device)
            if len(set(counts)) == 1:  # one parameter a feature, broadcast over its values
                values, slots = values.view(len(features), -1), slots[:, None]
            else:  # one parameter a value
                slots = slots.repeat_interleave(torch.tensor(counts, device=values.device), output_size=len(values))
            found = self.maps[key](values, slots)
            width = found.shape[1]
            rows.update(zip(features, found.view(-1).split([c * width for c in counts]), strict=True))
        return rows


class HashedRows(nn.Module):
    """murmur3's finaliser of fingerprint and seed, reduced to the table's rows."""

    seeds: Tensor
    moduli: Tensor

    def __init__(self, placements: Sequence[Hashed]) -> None:
        super().__init__()
        self.lookups = placements[0].lookups
        seeds = [[seed_of(p.space, j) for j in range(p.lookups)] for p in placements]
        self.register_buffer("seeds", _tensor(seeds), persistent=False)
        self.register_buffer("moduli", _tensor([[p.table.rows] for p in placements]), persistent=False)

    def forward(self, prints: Tensor, slot: Tensor) -> Tensor:
        """prints int64 [n] or [F, m]; slot (whose placement) int64 [n] or [F, 1] -> rows int64 [n or F m, lookups]."""
        rows = torch.remainder(mix(prints[..., None], _at(self.seeds, slot)), _at(self.moduli, slot))
        return rows.reshape(-1, self.lookups)


class Vocabularies(nn.Module):
    """Exact search of fingerprints in several sorted vocabularies at once.

    Fingerprints are spread evenly, so their leading bits name a bucket of about one entry, and a few steps of binary
    search end the work: two cache misses an id where a search of the whole vocabulary takes its logarithm. Each
    vocabulary ends with entries that no id exceeds, so a search may run past its bucket without harm.
    """

    prints: Tensor
    starts: Tensor
    slots: Tensor

    def __init__(self, placements: Sequence[Own]) -> None:
        super().__init__()
        spaces = {(p.space, p.unknown_rows): p for p in placements}
        known = {key: np.ascontiguousarray(p.fingerprints, dtype=np.int64) for key, p in spaces.items()}
        bits = {key: max(1, len(ids).bit_length()) for key, ids in known.items()}
        fill = {key: np.bincount(_bucket(ids, bits[key]), minlength=1 << bits[key]) for key, ids in known.items()}
        self._strides = [1 << j for j in reversed(range(max(int(f.max()) for f in fill.values()).bit_length()))]
        beyond = np.full(1 << len(self._strides), np.iinfo(np.int64).max)
        prints: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        slots: dict[tuple[str, int], list[int]] = {}
        entries = buckets = 0
        for key, ids in known.items():
            unknown_rows, half = key[1], 1 << (bits[key] - 1)
            slots[key] = [64 - bits[key], half + buckets, entries + len(ids), unknown_rows - entries, unknown_rows,
                          seed_of(key[0])]  # fmt: skip
            prints += [ids, beyond]
            starts.append(np.cumsum(fill[key]) - fill[key] + entries)
            entries += len(ids) + len(beyond)
            buckets += len(fill[key])
        self._one_unknown = all(key[1] == 1 for key in spaces)
        begin = np.concatenate(starts)
        smallest = torch.int32 if entries < 2**31 else torch.int64
        self.register_buffer("prints", _tensor(np.concatenate(prints)), persistent=False)
        self.register_buffer("starts", _tensor(begin).to(smallest), persistent=False)
        self.register_buffer("slots", _tensor([slots[p.space, p.unknown_rows] for p in placements]), persistent=False)

    def forward(self, prints: Tensor, slot: Tensor) -> Tensor:
        """prints int64 [n] or [F, m]; slot (whose placement) int64 [n] or [F, 1] -> rows int64 [n or F m, 1]."""
        shift, base, end, offset, unknown_rows, seed = _at(self.slots, slot).unbind(-1)
        place = _at(self.starts, (prints >> shift).add_(base)).to(torch.int64)
        for stride in self._strides:
            place.add_(_at(self.prints, place + (stride - 1)) < prints, alpha=stride)
        known = (_at(self.prints, place) == prints).logical_and_(place < end)
        place.add_(offset)
        if self._one_unknown:
            return place.mul_(known).view(-1, 1)
        return torch.where(known, place, torch.remainder(mix(prints, seed), unknown_rows)).view(-1, 1)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """values[places]; `index_select` takes half the time of indexing."""
    return values.index_select(0, places.view(-1)).view(*places.shape, *values.shape[1:])


def _bucket(prints: np.ndarray, bits: int) -> np.ndarray:
    return (prints >> (64 - bits)) + (1 << (bits - 1))


def _tensor(values: object) -> Tensor:
    """int64, always real memory, also where modules are being made on the meta device."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
