"""The lifetime of table rows that belong to one id: from which example on they are trained, when they are forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from engine.batch import Batch
from engine.bundle import Bundle
from engine.config_learning import LearningConfig
from engine.tables import CHUNK, TableEmbedding
from engine.training.online import OnlineTrainer

_ELSEWHERE = 0x5555555555555555
"""Changes the fingerprint of an id that is not admitted yet into one that no vocabulary holds."""
_LOOKS = 10
"""Times in `expiry_seconds` that rows are looked through."""


class RowLifetime:
    """Admission and expiry, only for rows that belong to one id (`engine.placement.Own`).

    Tables that ids share, as those of `hashing` and `unified`, neither grow nor hold rows of one id: nothing is counted
    there and nothing expires. Counts are exact and bounded by the vocabulary: an integer and a time a row.

    admission n: an id's values count, those of the training split first; with fewer than n the id trains the unknown
    row in place of its own. expiry: rows of which nothing came for so many seconds of event time are put back to what
    the table began with, go out with the next delta, and have to be admitted again.
    """

    def __init__(self, bundle: Bundle, learning: LearningConfig, trainer: OnlineTrainer) -> None:
        method = trainer.core.method
        self._trainer = trainer
        self._admission, self._expiry = learning.admission, learning.expiry_seconds
        own = method.own_rows() if isinstance(method, TableEmbedding) else {}
        wanted = learning.admission > 1 or learning.expiry_seconds is not None
        self._own = own if wanted else {}
        self._table = {f: p.table.name for f, p in self._own.items()}
        self._unknown = {p.table.name: p.unknown_rows for p in self._own.values()}
        self._counts: dict[str, np.ndarray] = {}
        self._seen: dict[str, np.ndarray] = {}  # event time of the newest value; inf: nothing to forget
        for placement in self._own.values():
            name, unknown = placement.table.name, placement.unknown_rows
            if name in self._counts:
                continue
            self._counts[name] = np.zeros(placement.table.rows, np.int64)
            self._seen[name] = np.full(placement.table.rows, np.nan)
            statistics = bundle.statistics.get(placement.space)
            if statistics is not None:
                at = statistics.rows(torch.from_numpy(np.array(placement.fingerprints))).numpy()
                self._counts[name][unknown:] = statistics.counts[at]
        self._looked = -np.inf
        self.expired = 0

    def admit(self, batch: Batch, now: float) -> Batch:
        """Counts a batch's ids -> the batch as it is to be trained. now: event time of its newest example."""
        if not self._own:
            return batch
        keys, sizes = batch.ids.keys(), batch.ids.length_per_key()
        values = batch.ids.values()
        parts = dict(zip(keys, values.split(sizes), strict=True))
        rows = self._trainer.core.method.placer({f: parts[f] for f in self._own})  # type: ignore[operator]
        found = {feature: its.numpy() for feature, its in rows.items()}
        for feature, its in found.items():
            table = self._table[feature]
            np.add.at(self._counts[table], its, 1)
            self._seen[table][its] = now
        if self._admission > 1:
            changed = dict(parts)
            for feature, its in found.items():
                table = self._table[feature]
                early = (self._counts[table][its] < self._admission) & (its >= self._unknown[table])
                if early.any():
                    changed[feature] = torch.where(torch.from_numpy(early), parts[feature] ^ _ELSEWHERE, parts[feature])
            ids = KeyedJaggedTensor(
                keys=keys,
                values=torch.cat([changed[key] for key in keys]),
                lengths=batch.ids.lengths(),
                stride=batch.ids.stride(),
                length_per_key=sizes,
            )
            batch = replace(batch, ids=ids)
        self._expire(now)
        return batch

    def _expire(self, now: float) -> None:
        """Looks through the rows now and then, by event time, so that a run that is repeated does the same."""
        if self._expiry is None or now < self._looked + self._expiry / _LOOKS:
            return
        self._looked = now
        for table, seen in self._seen.items():
            seen[np.isnan(seen)] = now  # waited for since the learner began
            old = np.flatnonzero(seen < now - self._expiry)
            old = old[old >= self._unknown[table]]
            if len(old):
                self._trainer.put_rows(table, old, self._first(table, old))
                seen[old] = np.inf
                self._counts[table][old] = 0
                self.expired += len(old)

    def _first(self, table: str, rows: np.ndarray) -> np.ndarray:
        """What rows int64 [n], ascending, began with."""
        method = self._trainer.core.method
        assert isinstance(method, TableEmbedding)
        chunks = np.unique(rows // CHUNK)
        parts = [method.first_weights(table, int(c)).numpy()[rows[rows // CHUNK == c] % CHUNK] for c in chunks]
        return np.concatenate(parts)

    def state(self) -> dict[str, np.ndarray]:
        counts = {f"counts/{name}": value.copy() for name, value in self._counts.items()}
        seen = {f"seen/{name}": value.copy() for name, value in self._seen.items()}
        return {**counts, **seen, "looked": np.array([self._looked, float(self.expired)])}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        for name in self._counts:
            self._counts[name], self._seen[name] = np.array(state[f"counts/{name}"]), np.array(state[f"seen/{name}"])
        self._looked, self.expired = float(state["looked"][0]), int(state["looked"][1])
