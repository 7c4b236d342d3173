"""Memory of preparing and reading data at one and at four times the rows: it must not grow with them.

    python benchmarks/memory_of_rows.py [--rows 1500000]

Each size runs in a process of its own: a log in no order of time (so that it is sorted on disk) with users, items,
categories, numbers and a history of 50 is written, prepared, and read for 200 shuffled batches. Measured is the peak of
anonymous memory (RssAnon, sampled every 5 ms): what the process holds itself. Mapped file pages are the system's cache
and can be dropped at any time; they are in `peak_rss_mb` (VmHWM), which may grow while memory is free.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, ITEMS, GROUP = 20_000, 5_000, 1 << 17


def write_log(path: Path, rows: int) -> None:
    """Row groups of 128 Ki rows, one in memory at a time; the same users and items at any size."""
    rng = np.random.default_rng(1)
    writer = None
    for start in range(0, rows, GROUP):
        n = min(GROUP, rows - start)
        table = pa.table(
            {
                "user_id": rng.integers(USERS, size=n),
                "item_id": rng.integers(ITEMS, size=n),
                "timestamp": 1_700_000_000 + rng.integers(0, 10_000_000, size=n),
                "clicked": (rng.random(n) < 0.3).astype(np.int8),
                "site": rng.integers(1000, size=n).astype(str),
                "device": rng.integers(5, size=n),
                "price": rng.normal(size=n),
                "age": rng.integers(90, size=n),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def configuration(path: Path) -> dict[str, Any]:
    return {
        "name": "memory",
        "data": {"source": {"interactions": str(path)}, "labels": {"click": {"column": "clicked"}}},
        "features": [
            {"name": "user_id", "side": "user"},
            {"name": "item_id"},
            {"name": "site"},
            {"name": "device", "side": "context"},
            {"name": "price", "kind": "numeric"},
            {"name": "age", "kind": "numeric", "side": "user", "transform": "bins"},
            {"name": "history", "kind": "sequence", "of": "item_id", "max_length": 50},
        ],
    }


def status(field: str) -> float:
    """MiB of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


class Peak:
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        self.mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.mib = max(self.mib, status("RssAnon"))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(log: Path, cache: Path) -> dict[str, float]:
    """In this process: prepare and read."""
    from engine.config import Config
    from engine.data.prepare import prepare
    from engine.plugins import Plugins

    config = Config.model_validate(configuration(log))
    before = status("RssAnon")
    with Peak() as peak:
        begin = time.perf_counter()
        prepared = prepare(config, Plugins(), cache=cache)
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        rows = sum(batch.targets for batch in islice(prepared.batches("train", 1024, shuffle_seed=1), 200))
        rate = rows / (time.perf_counter() - begin)
    return {
        "anonymous_before_mb": round(before),
        "peak_anonymous_mb": round(peak.mib),
        "peak_rss_mb": round(status("VmHWM")),
        "prepare_seconds": round(seconds, 1),
        "batch_rows_per_second": round(rate),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    arguments.add_argument("--rows", type=int, default=1_500_000, help="rows at 1x")
    arguments.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    found = []
    for scale in (1, 4):
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "log.parquet"
            write_log(log, given.rows * scale)
            command = [sys.executable, "-W", "ignore", __file__, "--measure", str(log), str(Path(scratch) / "cache")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append({"rows": given.rows * scale} | json.loads(done.stdout.splitlines()[-1]))
    peaks = [size["peak_anonymous_mb"] - size["anonymous_before_mb"] for size in found]
    print(
        json.dumps(
            {
                "bench": "memory_of_rows",
                "sizes": found,
                "growth_mb": peaks[1] - peaks[0],
                "ratio": round(peaks[1] / peaks[0], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
