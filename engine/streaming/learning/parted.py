"""Partitions that are joined one by one, so that each can go to another learner with all that it depends on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from engine.batch import Batch
from engine.bundle import Bundle
from engine.data.encoder import FeatureEncoder
from engine.streaming.join.ready import Examples
from engine.streaming.learning.examples_read import ExamplesRead
from engine.streaming.learning.fetch import Chunk
from engine.streaming.learning.joining import EventsJoined

Part = EventsJoined | ExamplesRead

_SHIFT = 40
"""A slot here is a partition's own, below 2^40, and the partition above it."""


class PartedStream:
    """A learner's stream, one `EventsJoined` or `ExamplesRead` a partition; to the learner it looks as one of them.

    held: partitions that are learnt from. kept: those that were given up, or come from a checkpoint, as they then
    stood: they stay in this learner's checkpoints until another has taken them up. A batch is of one partition. Each
    partition has its own watermark: none waits for another. Items are shared: an item event counts for all partitions
    of this learner.
    """

    def __init__(self, bundle: Bundle, make: Callable[[], Part]) -> None:
        """make: a stream of one partition, from its beginning."""
        self.held: dict[int, Part] = {}
        self.kept: dict[int, Part] = {}
        self.encoder: FeatureEncoder = bundle.encoder
        self.catalogue = bundle.catalogue
        self.changed_rows: list[np.ndarray] = []
        self.ready, self.pending = _Ready(self.held), _Pending(self.held)
        self._make = make
        self.OUTCOMES = make().OUTCOMES
        self._items: dict[str, dict[str, object]] = {}  # of partitions that others have by now
        self._past, self._past_join = Counter[str](), Counter[str]()  # what was counted here in partitions given up
        self._since: dict[int, tuple[Counter[str], Counter[str]]] = {}  # a held partition's counts when it came

    # -------------------------------------------------------------------------------------------- partitions
    def fresh(self) -> Part:
        return self._make()

    def restored(self, state: Mapping[str, np.ndarray]) -> Part:
        part = self._make()
        part.load(state)
        return part

    def hold(self, partition: int, part: Part) -> None:
        """Learns from it from now on."""
        self.kept.pop(partition, None)
        self.held[partition] = part
        self._since[partition] = (Counter(part.counts), Counter(part.join_counts()))
        part.assign([partition], 0.0)
        if part.items:
            self.catalogue = self.catalogue.updated([*part.items], [*part.items.values()], self.encoder)
            self.changed_rows.append(self.catalogue.rows([*part.items]))
        self._share()

    def give_up(self, partition: int) -> None:
        """It stands still from now on."""
        part = self.held.pop(partition)
        counts, join = self._counted(partition, part)
        self._past.update(counts)
        self._past_join.update(join)
        del self._since[partition]
        self.kept[partition] = part

    def forget(self, partition: int) -> None:
        """Another learner has it."""
        part = self.kept.pop(partition)
        self._remember(part)

    # ------------------------------------------------------------------------------- as one stream to the learner
    def take(self, chunk: Chunk, clock: float) -> None:
        part = self.held[chunk.partition]
        part.take(chunk, clock)
        if part.changed_rows:
            self.catalogue = part.catalogue
            self.changed_rows += part.changed_rows
            part.changed_rows.clear()
            self._share()

    def advance(self, clock: float) -> None:
        for part in self.held.values():
            part.advance(clock)

    def assign(self, partitions: Sequence[int], clock: float) -> None:
        """Nothing: `hold` does it."""

    def turn_to(self, bundle: Bundle) -> None:
        items = self._said()
        for part in (*self.held.values(), *self.kept.values()):
            part.turn_to(bundle)
        self.catalogue = bundle.catalogue
        if items:
            self.catalogue = self.catalogue.updated([*items], [*items.values()], self.encoder)
        self._share()

    @property
    def newest(self) -> float:
        return float(np.fmax.reduce([part.newest for part in self.held.values()], initial=math.nan))

    @property
    def watermark(self) -> float:
        return min((part.watermark for part in self.held.values()), default=-math.inf)

    @property
    def counts(self) -> Counter[str]:
        """What was counted here, also in partitions that others have by now; nothing of what others counted."""
        total = Counter(self._past)
        for partition, part in self.held.items():
            total.update(self._counted(partition, part)[0])
        return total

    def join_counts(self) -> dict[str, int]:
        total = Counter(self._past_join)
        for partition, part in self.held.items():
            total.update(self._counted(partition, part)[1])
        return dict(total)

    def open(self) -> dict[str, int]:
        """Of the partitions that this learner is to answer for."""
        total: Counter[str] = Counter()
        for part in (*self.held.values(), *self.kept.values()):
            total.update(part.open())
        return dict(total)

    def waiting(self) -> dict[str, int]:
        """partition -> examples that are joined and not trained."""
        return {str(p): len(part.ready) for p, part in sorted({**self.held, **self.kept}.items())}

    def _counted(self, partition: int, part: Part) -> tuple[Counter[str], Counter[str]]:
        """Since it came here."""
        counts, join = Counter(part.counts), Counter(part.join_counts())
        before, before_join = self._since[partition]
        counts.subtract(before)
        join.subtract(before_join)
        return counts, join

    # ------------------------------------------------------------------------------------------------- items
    def _share(self) -> None:
        for part in self.held.values():
            if isinstance(part, EventsJoined):
                part.catalogue = part.pending.catalogue = self.catalogue

    def _remember(self, part: Part) -> None:
        for item, features in part.items.items():
            self._items.setdefault(item, {}).update(features)

    def _said(self) -> dict[str, dict[str, object]]:
        """What events said of items, in the order of the catalogue's rows."""
        said = {item: dict(features) for item, features in self._items.items()}
        for part in (*self.kept.values(), *self.held.values()):
            for item, features in part.items.items():
                said.setdefault(item, {}).update(features)
        ids = [*said]
        order = np.argsort(self.catalogue.rows(ids), kind="stable").tolist()
        return {ids[n]: said[ids[n]] for n in order}

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        own: dict[str, Any] = {"items": self._said(), "counts": self.counts, "join": self.join_counts()}
        found = {name: np.frombuffer(msgspec.json.encode(value), np.uint8) for name, value in own.items()}
        for partition, part in {**self.held, **self.kept}.items():
            found |= {f"{folder(partition)}/{name}": value for name, value in part.state().items()}
        return found

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Of a learner of which nothing is held yet; its partitions are `restored` one by one."""
        self._items = msgspec.json.decode(state["items"].tobytes())
        self._past = Counter(msgspec.json.decode(state["counts"].tobytes()))
        self._past_join = Counter(msgspec.json.decode(state["join"].tobytes()))
        if self._items:
            self.catalogue = self.catalogue.updated([*self._items], [*self._items.values()], self.encoder)


def partition_of(slot: int) -> int:
    """Of a slot of `ready` or `pending`."""
    return slot >> _SHIFT


def folder(partition: int) -> str:
    """Of a partition's arrays in a checkpoint."""
    return f"of-{partition:05d}"


class _Ready:
    """The queues of the partitions that are held; the longest has its turn."""

    def __init__(self, held: Mapping[int, Part]) -> None:
        self._held = held

    def __len__(self) -> int:
        return sum(len(part.ready) for part in self._held.values())

    @property
    def longest(self) -> int:
        return max((len(part.ready) for part in self._held.values()), default=0)

    def pop(self, count: int) -> Examples:
        partition = max(self._held, key=lambda p: len(self._held[p].ready))
        found = self._held[partition].ready.pop(count)
        columns = {name: getattr(found, name) for name in found.__dataclass_fields__}
        return Examples(**{**columns, "slot": found.slot + (partition << _SHIFT)})

    def free(self) -> np.ndarray:
        slots = [part.ready.free() + (partition << _SHIFT) for partition, part in self._held.items()]
        return np.concatenate([np.empty(0, np.int64), *slots])


class _Pending:
    """The stores of the partitions that are held."""

    def __init__(self, held: Mapping[int, Part]) -> None:
        self._held = held

    def __len__(self) -> int:
        return sum(len(part.pending) for part in self._held.values())

    def take(self, slots: np.ndarray) -> Batch:
        """Slots of one partition."""
        partition = partition_of(int(slots[0]))
        return self._held[partition].pending.take(slots - (partition << _SHIFT))

    def release(self, slots: np.ndarray) -> None:
        partitions = slots >> _SHIFT
        for partition in np.unique(partitions).tolist():
            mine = slots[partitions == partition]
            self._held[partition].pending.release(mine - (partition << _SHIFT))
