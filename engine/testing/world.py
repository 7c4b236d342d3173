"""The smallest world in which sources and rerankers can work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.components import Catalogue, PluginOptions, Retriever, SourceContext, UserState

ITEMS = 40
DIM = 8


class TinyCatalogue(Catalogue):
    """Items "1" to "40" with the columns item_id, title, genres ("a|b"), brand (some are null) and price."""

    def __init__(self, items: int = ITEMS) -> None:
        self._ids = [str(n + 1) for n in range(items)]
        self._columns = {
            "item_id": pa.array(self._ids, pa.string()),
            "title": pa.array([f"Title {n}" for n in self._ids], pa.string()),
            "genres": pa.array([f"{'abc'[n % 3]}|{'xyzw'[n % 4]}" for n in range(items)], pa.string()),
            "brand": pa.array([None if n % 7 == 0 else f"brand {n % 5}" for n in range(items)], pa.string()),
            "price": pa.array([float(n % 11) for n in range(items)], pa.float32()),
        }

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        place = {name: row for row, name in enumerate(self._ids)}
        return np.array([place.get(name, -1) for name in ids], dtype=np.int64)

    def ids(self, rows: np.ndarray) -> list[str]:
        return [self._ids[row] for row in rows]

    def column(self, name: str) -> pa.Array:
        return self._columns[name]


class _AllOfThem(Retriever):
    """Compares with all vectors: the retriever of the tiny world."""

    name = "all-of-them"

    def __init__(self, vectors: np.ndarray) -> None:
        super().__init__(vectors.shape[1], PluginOptions())
        self._vectors = vectors

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self._vectors.T
        if allowed is not None:
            scores[:, np.setdiff1d(np.arange(len(self._vectors)), allowed)] = -np.inf
        scores = np.pad(scores, ((0, 0), (0, max(0, k - scores.shape[1]))), constant_values=-np.inf)
        order = np.argsort(-scores, axis=1)[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        return np.where(np.isneginf(best), -1, order), best.astype(np.float32)

    def build(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        raise NotImplementedError("the tiny world's items do not change")

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        raise NotImplementedError("the tiny world's items do not change")

    def delete(self, ids: np.ndarray) -> None:
        raise NotImplementedError("the tiny world's items do not change")

    def save(self, path: Path) -> None:
        raise NotImplementedError("the tiny world is not kept")

    def load(self, path: Path) -> None:
        raise NotImplementedError("the tiny world is not kept")

    def stats(self) -> dict[str, Any]:
        return {"size": len(self._vectors), "dim": self.dim, "bytes": self._vectors.nbytes}


def tiny_context(items: int = ITEMS) -> SourceContext:
    """A served bundle's context with all its parts, of `items` items."""
    random = np.random.default_rng(7)
    vectors = random.standard_normal((items, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_user(user: UserState, request: Mapping[str, Any]) -> np.ndarray:
        rows = [int(item) - 1 for item in user.history if item.isdigit() and 0 < int(item) <= items]
        return vectors[rows].mean(axis=0) if rows else np.ones(DIM, np.float32)

    return SourceContext(
        catalogue=TinyCatalogue(items),
        counts=random.integers(0, 50, items),
        latest=np.where(np.arange(items) % 5 == 0, 0, 1_700_000_000 + random.integers(0, 10**6, items)),
        retriever=_AllOfThem(vectors),
        encode_user=encode_user,
        vectors=vectors,
    )
