"""Prepared data: batches for training, and everything a bundle needs to know of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from engine.batch import Batch
from engine.catalogue import ArrowCatalogue
from engine.components import UserState
from engine.data.background import ahead
from engine.data.encoder import FeatureEncoder, Values
from engine.data.encoding import MISSING, Encoded, ranges
from engine.data.numeric import NumericTransforms
from engine.data.plan import Plan
from engine.data.shuffle import Permutation
from engine.data.statistics import IdStatistics
from engine.data.store import Store, chunks
from engine.errors import DataError

_USERS = 1024
"""Users whose states are gathered together."""


class Prepared:
    """Memory-mapped rows with their splits.

    rows: split -> number of rows. label_rates: split -> share of positives of the first task; label_rate: of training.
    arrays: the memory-mapped columns.
    item_counts int64 [items]: positives in the training split. item_latest int64 [items]: time of the newest event.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.config = plan.config
        self.schema = plan.schema
        self.folder = folder
        self._plan = plan
        self.arrays = Store.open(folder)
        meta = json.loads((folder / "meta.json").read_text())
        self.rows: dict[str, int] = meta["rows"]
        self.label_rates: dict[str, float] = meta["label_rates"]
        self.label_rate = self.label_rates["train"]
        self.numeric = NumericTransforms.from_tensors(load_file(folder / "numeric.safetensors"))
        self.encoder = FeatureEncoder(self.schema, self.numeric)
        tensors = load_file(folder / "statistics.safetensors")
        spaces = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
        self.statistics = {space: IdStatistics.from_tensors(tensors, space) for space in spaces}
        self.catalogue = ArrowCatalogue.open(folder / "catalogue")
        self.item_counts = np.array(self.arrays["item_counts"])
        self.item_latest = np.array(self.arrays["item_latest"])
        self._people = ArrowCatalogue.open(folder / "users")
        self._things = {"item": self.catalogue, "user": self._people}
        self._keys = {side: np.append(things.prints, MISSING) for side, things in self._things.items()}

    # -------------------------------------------------------------------------------------------- batches
    def steps(self, split: str, batch_size: int, *, positives_only: bool = False) -> int:
        """Batches in one pass over a split."""
        return -(-len(self._rows(split, positives_only)) // batch_size)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        positives_only: bool = False,
        start_step: int = 0,
    ) -> Iterator[Batch]:
        """One pass over a split (train, validation, test), prepared ahead by a thread.

        batch_size: rows over all processes; this one takes rows rank::world of each such batch, so the union over
            ranks is the batch of world 1. shuffle_seed: None keeps the order of time; equal seeds give equal orders.
        start_step: the first batch to give, at no cost for those before.
        """
        rows = self._rows(split, positives_only)
        order = None if shuffle_seed is None else Permutation(len(rows), shuffle_seed)

        def make() -> Iterator[Batch]:
            for start in range(start_step * batch_size, len(rows), batch_size):
                places = np.arange(start + rank, min(start + batch_size, len(rows)), world)
                yield self.batch(rows[places if order is None else order(places)])

        return ahead(make())

    def _rows(self, split: str, positives_only: bool) -> np.ndarray:
        if split not in self.rows:
            raise DataError(f"no split '{split}'; there are {', '.join(self.rows)}")
        return self.arrays[f"{'positive' if positives_only else 'split'}.{split}"]

    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, int64 [B], numbered as in the interactions."""
        store, size = self.arrays, len(rows)
        ids: dict[str, Values] = {}
        numbers: dict[str, np.ndarray] = {}
        if self._plan.row_ids:
            columns = np.ascontiguousarray(store["ids"][rows].T)
            ids |= {f.name: (columns[j], None) for j, f in enumerate(self._plan.row_ids)}
        if self._plan.row_numbers:
            dense = store["dense"][rows]
            numbers |= {f.name: dense[:, j] for j, f in enumerate(self._plan.row_numbers)}
        for feature in self._plan.row_lists:
            ids[feature.name] = Encoded(store[f"{feature.name}.values"], store[f"{feature.name}.offsets"]).take(rows)
        owner = {side: store[side][rows] for side in self._things}
        for side, features in (("item", self._plan.by_item), ("user", self._plan.by_user)):
            for feature in features:
                values = self._things[side].encoded[feature.name].take(owner[side])
                if feature.is_dense:
                    numbers[feature.name] = values[0]
                else:
                    ids[feature.name] = values
        if self._plan.from_log:
            lengths = store["past_length"][rows].astype(np.int64)
            places = ranges(store["past_start"][rows], lengths)
            ids |= {f.name: (store[f"sequence.{f.name}"][places], lengths) for f in self._plan.from_log}
        batch = self.encoder.assemble(ids, numbers, size, size)
        labels = store["labels"][rows]
        batch.labels = {task: torch.from_numpy(labels[:, j].copy()) for j, task in enumerate(self.schema.tasks)}
        batch.time = torch.from_numpy(store["time"][rows]) if self.schema.time else None
        batch.user_key = torch.from_numpy(self._keys["user"][owner["user"]]) if self.schema.user else None
        batch.item_key = torch.from_numpy(self._keys["item"][owner["item"]]) if self.schema.item else None
        return batch

    def outcomes(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
        """Labels of the first task float32 [n], user_key and item_key int64 [n] (None without users or items) of a
        split, oldest first, in chunks; no feature is read."""
        rows = self._rows(split, positives_only=False)
        for part in chunks(len(rows)):
            some = rows[part]
            user = self._keys["user"][self.arrays["user"][some]] if self.schema.user else None
            item = self._keys["item"][self.arrays["item"][some]] if self.schema.item else None
            yield self.arrays["labels"][some, 0], user, item

    # ---------------------------------------------------------------------------------------------- users
    def users(self) -> Iterator[UserState]:
        """Each user's state after all the data: features, positives and all items seen, newest first.

        The history is capped at `serving.history_cap`; an item seen twice is listed once.
        """
        if self.schema.user is None:
            return
        for part in chunks(len(self._people), _USERS):
            yield from self._states(part)

    def _states(self, part: slice) -> Iterator[UserState]:
        store, cap = self.arrays, self.config.serving.history_cap
        begin, end = store["user_past"][part].T
        past = store["past"][ranges(begin, np.minimum(end - begin, cap))]
        past_ends = np.cumsum(np.minimum(end - begin, cap))
        begin, end = store["user_rows"][part].T
        rows = store["by_user"][ranges(begin, end - begin)]
        row_ends = np.cumsum(end - begin)
        liked, seen = self._item_ids(store["item"][past]), self._item_ids(store["item"][rows])
        times = store["time"][past].tolist()
        features = [f for f in self.schema.features if f.side == "user" and f.kind != "sequence"]
        raw = {
            f.name: self._people.column(f.name)[part].to_pylist()
            for f in features
            if f.column in self._people.table.column_names
        }
        for place, user in enumerate(self._people.column(self._people.key)[part].to_pylist()):
            mine = slice(past_ends[place - 1] if place else 0, past_ends[place])
            all_mine = slice(row_ends[place - 1] if place else 0, row_ends[place])
            history = [(item, time) for item, time in zip(liked[mine], times[mine], strict=True) if item is not None]
            yield UserState(
                user=user,
                features={name: values[place] for name, values in raw.items()},
                history=[item for item, _ in history],
                times=[time for _, time in history],
                seen=[item for item in dict.fromkeys(seen[all_mine][::-1]) if item is not None],
            )

    def _item_ids(self, items: np.ndarray) -> list[str | None]:
        """Ids of catalogue rows, None for a missing item."""
        known = np.flatnonzero(items >= 0)
        texts: list[str | None] = [None] * len(items)
        if len(known) == len(items):
            return [*self.catalogue.ids(items)]
        for place, text in zip(known.tolist(), self.catalogue.ids(items[known]), strict=True):
            texts[place] = text
        return texts
