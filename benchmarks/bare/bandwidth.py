"""How fast this machine moves memory on one thread: the limit that a loop over large tables runs against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def copy_bytes_per_second(size: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes read and written a second by a large copy; the best of some."""
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return 2 * size / _best(lambda: target.copy_(source), repeats)


def gather_bytes_per_second(rows: int = 4_000_000, width: int = 16, count: int = 1 << 20, repeats: int = 5) -> float:
    """Bytes of vectors read and written a second when random rows of a table far larger than the caches are fetched."""
    table = torch.zeros(rows, width)
    index = torch.randint(rows, (count,))
    out = torch.empty(count, width)
    return 2 * count * width * 4 / _best(lambda: torch.index_select(table, 0, index, out=out), repeats)


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest of some runs, after one to warm up."""
    torch.set_num_threads(1)
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
