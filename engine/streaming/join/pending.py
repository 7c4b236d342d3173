"""Features of shown items as they were served, from the ranking until nothing more can be learnt from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from engine.batch import Batch
from engine.catalogue import ArrowCatalogue
from engine.data.encoder import FeatureEncoder, Values
from engine.data.encoding import Encoded
from engine.errors import CheckpointError, SchemaError
from engine.events import RankingData
from engine.streaming.join.as_served import ServedFeatures, encode_served
from engine.streaming.join.example_schema import schema_id
from engine.streaming.join.feature_rows import FeatureRows, longer
from engine.streaming.join.shown import Shown

if TYPE_CHECKING:
    from engine.streaming.events.decode import Rankings


class PendingExamples:
    """A slot an impression; what is a ranking's own (user, context, history) is kept once a ranking.

    catalogue: where item features come from that a ranking does not bring; may be replaced by a grown one at any time,
    what is kept stays as it was served. Room grows with the impressions that are not released, and is used again.
    """

    def __init__(self, encoder: FeatureEncoder, catalogue: ArrowCatalogue) -> None:
        self.encoder, self.catalogue = encoder, catalogue
        self._id = schema_id(encoder)
        features = encoder.schema.features
        self._items = FeatureRows([f for f in features if not f.from_request])
        self._requests = FeatureRows([f for f in features if f.from_request])
        self._owner = np.zeros(16, np.int64)  # by slot: the row of its ranking
        self._item = np.zeros(16, np.int64)
        self._user = np.zeros(16, np.int64)  # by row of a ranking
        self._time = np.zeros(16, np.int64)
        self._left = np.zeros(16, np.int64)  # its slots that are not released

    def __len__(self) -> int:
        """Impressions that are kept."""
        return len(self._items)

    def add(self, rankings: Rankings) -> Shown:
        """Encodes rankings -> their slots. One whose values cannot be read is refused, and the others are taken."""
        refused: dict[int, str] = {}
        data: Sequence[RankingData] = rankings.data
        try:
            served = encode_served(self.encoder, self.catalogue, data)
        except _UNREADABLE:
            refused = self._unreadable(data)
            data = [its for number, its in enumerate(data) if number not in refused]
            served = encode_served(self.encoder, self.catalogue, data)
        good = np.ones(len(rankings.data), bool)
        good[list(refused)] = False
        sizes = np.zeros(len(rankings.data), np.int64)
        sizes[good] = served.sizes
        slot = self._put(served, rankings.seconds[good])
        return Shown(slot, served.item, np.concatenate([[0], np.cumsum(sizes)]), refused)

    def take(self, slots: np.ndarray) -> Batch:
        """The batch of these slots, int64 [B], repeats allowed: U = N = B, without labels, time that of the ranking."""
        size, owner, schema = len(slots), self._owner[slots], self.encoder.schema
        ids: dict[str, Values] = {}
        numbers: dict[str, np.ndarray] = {}
        self._items.take(slots, ids, numbers)
        self._requests.take(owner, ids, numbers)
        batch = self.encoder.assemble(ids, numbers, size, size)
        batch.user_of_target = torch.arange(size)
        batch.time = torch.from_numpy(self._time[owner]) if schema.time else None
        batch.user_key = torch.from_numpy(self._user[owner]) if schema.user else None
        batch.item_key = torch.from_numpy(self._item[slots]) if schema.item else None
        return batch

    def release(self, slots: np.ndarray) -> None:
        """Gives up slots int64 [n], distinct and kept."""
        if not len(slots):
            return
        self._items.free(slots)
        owner, count = np.unique(self._owner[slots], return_counts=True)
        self._left[owner] -= count
        self._requests.free(owner[self._left[owner] == 0])

    def _put(self, served: ServedFeatures, seconds: np.ndarray) -> np.ndarray:
        shown = served.sizes > 0
        row = np.full(len(shown), -1, np.int64)
        row[shown] = self._requests.put(_only(served.of_request, shown), int(shown.sum()))
        slot = self._items.put(served.of_items, len(served.item))
        self._room()
        mine = row[shown]
        self._user[mine], self._time[mine] = served.user[shown], seconds[shown].astype(np.int64)
        self._left[mine] = served.sizes[shown]
        self._owner[slot], self._item[slot] = np.repeat(row, served.sizes), served.item
        return slot

    def _room(self) -> None:
        self._owner, self._item = longer(self._owner, self._items.top), longer(self._item, self._items.top)
        self._user, self._time, self._left = (
            longer(array, self._requests.top) for array in (self._user, self._time, self._left)
        )

    def _unreadable(self, data: Sequence[RankingData]) -> dict[int, str]:
        """Which rankings cannot be encoded, and why."""
        refused = {}
        for number, its in enumerate(data):
            try:
                encode_served(self.encoder, self.catalogue, [its])
            except _UNREADABLE as error:
                refused[number] = str(error)
        return refused

    # ----------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        """All that is kept; a store of the same features goes on from it as this one."""
        slots, rows = self._items.used(), self._requests.used()
        return {
            "schema": np.frombuffer(self._id.encode(), np.uint8).copy(),
            "owner": self._owner[slots],
            "item": self._item[slots],
            "user": self._user[rows],
            "time": self._time[rows],
            "left": self._left[rows],
            **self._items.state("items"),
            **self._requests.state("requests"),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """CheckpointError where it is of other features."""
        if bytes(np.asarray(state["schema"], np.uint8)).decode() != self._id:
            raise CheckpointError(
                "the examples that wait are of a model with other features; start without the checkpoint"
            )
        self._items.load("items", state)
        self._requests.load("requests", state)
        self._room()
        slots, rows = self._items.used(), self._requests.used()
        self._owner[slots], self._item[slots] = state["owner"], state["item"]
        self._user[rows], self._time[rows], self._left[rows] = state["user"], state["time"], state["left"]


def _only(columns: Mapping[str, Encoded], rows: np.ndarray) -> Mapping[str, Encoded]:
    """Encoded columns of some rows, bool [n]."""
    if rows.all():
        return columns
    some = {}
    for name, column in columns.items():
        values, lengths = column.take(np.flatnonzero(rows))
        some[name] = Encoded(values, None if lengths is None else np.concatenate([[0], np.cumsum(lengths)]))
    return some


_UNREADABLE = (SchemaError, ValueError, pa.ArrowException)
"""Of feature values that JSON can hold; text with lone surrogates is a ValueError."""
