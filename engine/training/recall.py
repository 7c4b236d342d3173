"""What a trained encoder finds, beside what mere popularity finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine import metrics
from engine.batch import Batch
from engine.retrieval import EncoderModel, item_batch, similarity

if TYPE_CHECKING:
    from engine.data.prepared import Prepared

CUTS = (10, 20, 50)
USERS = 10_000
"""Most users that are asked for; the first to come in the split."""
_ITEMS = 8192
_QUERIES = 256


@torch.inference_mode()
def encode_catalogue(model: EncoderModel, prepared: Prepared) -> np.ndarray:
    """Vectors of all items of the catalogue, float32 [items, D] (or [items, V, D]), by row."""
    items = len(prepared.catalogue)
    parts = [
        model.items(item_batch(prepared.encoder, prepared.catalogue, np.arange(start, min(items, start + _ITEMS))))
        for start in range(0, items, _ITEMS)
    ]
    return torch.cat(parts).numpy() if parts else np.empty((0, model.output_dim), np.float32)


@torch.inference_mode()
def evaluate(
    model: EncoderModel, prepared: Prepared, item_vectors: np.ndarray, split: str = "test"
) -> dict[str, float]:
    """How many of a user's positives of a split are among the best items, without those had in training.

    split: "test", or "validation" to choose by. A user asks once, with features and history as they were at the user's
    first positive of the split; all rows count as had that training holds of the user, whatever their label. -> `users`
    (with a positive left), recall@k, ndcg@k, mrr, and the same under `popular/` for the items of most positives; empty
    where the split has no users with positives.
    """
    users, queries, positives = _questions(model, prepared, split)
    had = _had(prepared, users)
    positives = positives[~np.isin(positives, had)]
    if not len(positives):
        return {}
    items = len(prepared.catalogue)
    asked, relevant = positives // items, positives % items
    counts = np.bincount(asked, minlength=len(users))
    vectors = torch.from_numpy(item_vectors)
    popularity = torch.from_numpy(prepared.item_counts.astype(np.float32))
    found = {"users": float((counts > 0).sum())}
    lists: dict[str, list[np.ndarray]] = {"": [], "popular/": []}
    for start in range(0, len(users), _QUERIES):
        end = min(len(users), start + _QUERIES)
        span = had[np.searchsorted(had, start * items) : np.searchsorted(had, end * items)] - start * items
        lists[""].append(_best(similarity(queries[start:end], vectors), span))
        lists["popular/"].append(_best(popularity.expand(end - start, -1).clone(), span))
    for name, parts in lists.items():
        hits = metrics.hits(np.concatenate(parts), asked, relevant)
        for k in CUTS:
            found[f"{name}recall@{k}"] = metrics.recall_at(hits, counts, k) or 0.0
            found[f"{name}ndcg@{k}"] = metrics.ndcg_at(hits, counts, k) or 0.0
        found[f"{name}mrr"] = metrics.mrr(hits, counts) or 0.0
    return found


def _best(scores: Tensor, had: np.ndarray) -> np.ndarray:
    """scores [Q, items], had int64 (query * items + item) -> int64 [Q, k] best items, -1 where there are no more."""
    scores.view(-1)[torch.from_numpy(had)] = -torch.inf
    values, places = scores.topk(min(max(CUTS), scores.shape[1]), dim=1)
    return np.where(torch.isneginf(values), -1, places)


def _questions(model: EncoderModel, prepared: Prepared, split: str) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Users int64 [Q] ascending, their vectors [Q, D], and their positives as distinct Q-row * items + item."""
    users: list[np.ndarray] = []
    vectors: list[Tensor] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    known = np.empty(0, np.int64)
    for batch in prepared.batches(split, _ITEMS, positives_only=True):
        keys, rows = _keys(batch, prepared)
        pairs.append((keys[rows >= 0], rows[rows >= 0]))
        distinct, first = np.unique(keys, return_index=True)
        new = ~np.isin(distinct, known)
        new &= np.cumsum(new) <= USERS - len(known)
        if new.any():
            users.append(distinct[new])
            vectors.append(model.users(batch)[torch.from_numpy(first[new])])
            known = np.concatenate(users)
    if not len(known):
        return known, torch.empty(0, model.output_dim), np.empty(0, np.int64)
    order = np.argsort(known)
    user_of, item = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return known[order], torch.cat(vectors)[torch.from_numpy(order)], _pairs(prepared, known[order], user_of, item)


def _had(prepared: Prepared, users: np.ndarray) -> np.ndarray:
    """What these users (ascending) have in the training split: distinct row of user * items + item, ascending."""
    found = [np.empty(0, np.int64)]
    for batch in prepared.batches("train", 8 * _ITEMS):
        keys, rows = _keys(batch, prepared)
        found.append(_pairs(prepared, users, keys[rows >= 0], rows[rows >= 0]))
    return np.unique(np.concatenate(found))


def _keys(batch: Batch, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """The user's key and the item's row (-1: not in the catalogue) of each row of a batch."""
    assert batch.user_key is not None
    assert batch.item_key is not None
    return batch.user_key.numpy(), prepared.catalogue.rows_of(batch.item_key.numpy())


def _pairs(prepared: Prepared, users: np.ndarray, user_of: np.ndarray, item: np.ndarray) -> np.ndarray:
    """(user key, item row) of these users -> distinct numbers, place of the user * items + item, ascending."""
    if not len(users):
        return np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(users, user_of), len(users) - 1)
    mine = users[place] == user_of
    return np.unique(place[mine] * len(prepared.catalogue) + item[mine])
