"""Nearest items by comparing with all of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.components import PluginOptions, Retriever
from engine.errors import BundleError
from engine.hookspecs import hookimpl
from plugins.retrieval.rows import Rows

FILE = "exact.safetensors"


class ExactRetriever(Retriever):
    """Exact nearest items: a matrix product in blocks and the best k; no index to build, recall 1.

    Search reads a snapshot and takes no lock. Upserts add rows behind the snapshot's last one and mark the rows that
    they replace as dead; the new snapshot shares the vectors, so an upsert costs bytes a row, not a copy of the matrix.
    Dead rows are dropped when they are as many as live ones.
    """

    name = "exact"

    class Options(PluginOptions):
        block: int = Field(65_536, ge=1, description="items compared at a time; bounds the memory of a search")

    def __init__(self, dim: int, options: Options) -> None:
        super().__init__(dim, options)
        self.options: ExactRetriever.Options = options
        self._writing = threading.Lock()
        # what a search reads, replaced as one; the vectors may have free rows behind the last row in use
        self._snapshot = (Rows.of(np.empty(0, np.int64)), torch.empty(0, dim))

    def build(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, fresh = self._checked(ids, vectors)
        with self._writing:
            self._publish(Rows.of(ids.copy()), fresh.clone())

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, fresh = self._checked(ids, vectors)
        with self._writing:
            before, held = self._snapshot
            rows, used = before.without(ids).with_more(ids), len(before)
            if len(rows) > len(held):
                wider = torch.empty(len(rows) + len(rows) // 2, self.dim)
                wider[:used] = held[:used]
                held = wider
            held[used : len(rows)] = fresh
            self._publish(rows, held)

    def delete(self, ids: np.ndarray) -> None:
        with self._writing:
            rows, vectors = self._snapshot
            self._publish(rows.without(np.asarray(ids, dtype=np.int64)), vectors)

    def _publish(self, rows: Rows, vectors: Tensor) -> None:
        if len(rows) > 2 * rows.live:
            alive = np.flatnonzero(rows.alive)
            rows, vectors = Rows.of(rows.ids[alive]), vectors[torch.from_numpy(alive)]
        self._snapshot = (rows, vectors)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        rows, vectors = self._snapshot
        wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        if wanted.ndim != 2 or wanted.shape[1] != self.dim:
            raise ValueError(f"queries of shape {tuple(wanted.shape)}; wanted [Q, {self.dim}]")
        if k < 1:
            raise ValueError(f"k is {k}; at least 1 is wanted")
        chosen = None if allowed is None else torch.from_numpy(rows.find(np.unique(allowed)))
        total = len(rows) if chosen is None else len(chosen)
        alive = torch.from_numpy(rows.alive) if rows.live < len(rows) else None
        best = torch.full((len(wanted), k), -torch.inf)
        best_rows = torch.full((len(wanted), k), -1, dtype=torch.int64)
        for start in range(0, total, self.options.block):
            end = min(total, start + self.options.block)
            part = torch.arange(start, end) if chosen is None else chosen[start:end]
            scores = wanted @ (vectors[start:end] if chosen is None else vectors[part]).T
            if alive is not None and chosen is None:
                scores.masked_fill_(~alive[start:end], -torch.inf)
            top, places = scores.topk(min(k, end - start), dim=1)
            best, order = torch.cat([best, top], dim=1).topk(k, dim=1)
            best_rows = torch.cat([best_rows, part[places]], dim=1).gather(1, order)
        found = np.append(rows.ids, -1)[np.where(torch.isneginf(best), -1, best_rows)]
        return found, best.numpy()

    def save(self, path: Path) -> None:
        rows, vectors = self._snapshot
        alive = torch.from_numpy(np.flatnonzero(rows.alive))
        save_file({"ids": torch.from_numpy(rows.ids)[alive], "vectors": vectors[alive]}, path / FILE)

    def load(self, path: Path) -> None:
        try:
            with safe_open(path / FILE, framework="pt") as file:
                ids, vectors = file.get_tensor("ids"), file.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path / FILE}: cannot be read: {error}") from error
        if vectors.ndim != 2 or vectors.shape != (len(ids), self.dim):
            raise BundleError(f"{path / FILE}: vectors {tuple(vectors.shape)} for {len(ids)} ids of width {self.dim}")
        with self._writing:
            self._publish(Rows.of(ids.numpy()), vectors)

    def stats(self) -> dict[str, Any]:
        rows, vectors = self._snapshot
        return {
            "size": rows.live,
            "dim": self.dim,
            "bytes": vectors.nbytes + rows.nbytes,
            "dead": len(rows) - rows.live,
        }

    def _checked(self, ids: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, Tensor]:
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        fresh = np.ascontiguousarray(vectors, dtype=np.float32)
        if ids.ndim != 1 or fresh.shape != (len(ids), self.dim):
            raise ValueError(f"vectors of shape {fresh.shape} for {len(ids)} ids; wanted [{len(ids)}, {self.dim}]")
        if len(np.unique(ids)) < len(ids):
            raise ValueError("an id stands twice among the ids")
        if not np.isfinite(fresh).all():
            raise ValueError(f"the vector of id {ids[~np.isfinite(fresh).all(axis=1)][0]} is not finite")
        return ids, torch.from_numpy(fresh)


@hookimpl
def retrievers() -> list[type[Retriever]]:
    return [ExactRetriever]
