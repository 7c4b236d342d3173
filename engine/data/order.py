"""Sorting more rows than memory holds: rows are dealt into buckets on disk, each is sorted by itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from engine.data.store import CHUNK, Store, chunks

IN_MEMORY = 1 << 20
"""Rows sorted at a time."""


def deal(rows: int, buckets: int, bucket_of: Callable[[slice], np.ndarray], out: np.ndarray) -> np.ndarray:
    """A counting sort of row numbers by bucket, in two passes.

    bucket_of: slice of rows -> int64 bucket of each. out: int64 [rows], filled. -> int64 [buckets + 1] offsets into it.
    """
    counts = np.zeros(buckets, dtype=np.int64)
    for part in chunks(rows):
        counts += np.bincount(bucket_of(part), minlength=buckets)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    cursor = offsets[:-1].copy()
    for part in chunks(rows):
        bucket = bucket_of(part)
        order = np.argsort(bucket, kind="stable")
        ordered = bucket[order]
        here = np.bincount(bucket, minlength=buckets)
        first = np.cumsum(here) - here
        out[cursor[ordered] + np.arange(len(ordered)) - first[ordered]] = part.start + order
        cursor += here
    return offsets


def bucket_count(rows: int, limit: int) -> int:
    """One where all rows may be sorted at once, else as many as hold half the limit each: keys do not spread evenly."""
    return 1 if rows <= limit else -(-2 * rows // limit)


def sort_by_time(store: Store, user_rank: np.ndarray, item_rank: np.ndarray, limit: int = IN_MEMORY) -> None:
    """Writes `order` int64 [n]: rows by (time, user, item), equal rows as they were.

    user_rank, item_rank: int64 [V + 1], the last entry for a missing id.
    """
    time, user, item = store["time"], store["user"], store["item"]
    rows = len(time)
    order = store.create("order", "i8", (rows,))
    if rows <= limit:
        order[:] = np.lexsort((item_rank[item], user_rank[user], time))
        return
    # Buckets are ranges of (time, user) as one number, so that a log whose times are days still spreads.
    first, last = _bounds(time)
    width = len(user_rank) + 1 if (last - first + 1) * (len(user_rank) + 1) < 1 << 62 else 0

    def key(part: slice | np.ndarray) -> np.ndarray:
        since = time[part] - first
        return since * width + user_rank[user[part]] + 1 if width else since

    sample = np.sort(key(np.linspace(0, rows - 1, min(rows, CHUNK)).astype(np.int64)))
    buckets = bucket_count(rows, limit)
    edges = np.unique(sample[np.arange(1, buckets) * len(sample) // buckets])
    dealt = store.create("dealt", "i8", (rows,))
    offsets = deal(rows, len(edges) + 1, lambda part: np.searchsorted(edges, key(part), side="right"), dealt)
    for start, stop in pairwise(offsets):
        part = dealt[start:stop]
        order[start:stop] = part[np.lexsort((item_rank[item[part]], user_rank[user[part]], time[part]))]
    store.drop("dealt")


def _bounds(time: np.ndarray) -> tuple[int, int]:
    parts = [(int(time[part].min()), int(time[part].max())) for part in chunks(len(time))]
    return min(low for low, _ in parts), max(high for _, high in parts)
