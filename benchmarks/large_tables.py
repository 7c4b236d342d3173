"""Rows over 26 large vocabularies, as a bare loop reads them and as the engine does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DENSE = 13
DIM = 16
HIDDEN = [128, 64]
SIZES = [int(s) for s in np.geomspace(100_000, 1_000_000, 26)]
"""Ids a feature: 26 sizes from 100,000 to 1,000,000; 10 million rows together."""


@dataclass(frozen=True)
class LargeTables:
    """arrays: .npz with ids, dense and label. config: of the engine, for the same rows (all of them train)."""

    arrays: Path
    config: Path


def make(folder: Path, rows: int, sizes: list[int], seed: int = 0) -> LargeTables:
    """Ids are log-uniform: half of the rows use a thousandth of the ids. The label depends on some of them."""
    random = np.random.default_rng(seed)
    ids = np.stack([np.exp(random.uniform(0, np.log(s), rows)).astype(np.int64) % s for s in sizes], axis=1)
    dense = random.normal(size=(rows, DENSE)).astype(np.float32)
    pull = sum(np.sin(ids[:, j] * 12.9898) for j in range(4)) + dense[:, 0] - 1.0
    label = (random.uniform(size=rows) < 1 / (1 + np.exp(-pull))).astype(np.float32)
    np.savez(folder / "tables.npz", ids=ids, dense=dense, label=label)
    columns = {f"t{j}": ids[:, j] for j in range(len(sizes))} | {f"d{j}": dense[:, j] for j in range(DENSE)}
    split = np.full(rows, "train")
    split[-2 * max(1, rows // 200) :] = "test"
    pq.write_table(pa.table({**columns, "label": label.astype(np.int8), "split": split}), folder / "tables.parquet")
    (folder / "tables.yaml").write_text(yaml.safe_dump(_config(folder, sizes), sort_keys=False))
    return LargeTables(folder / "tables.npz", folder / "tables.yaml")


def _config(folder: Path, sizes: list[int]) -> dict[str, object]:
    """Tables of exactly these sizes, whatever ids the rows hold; one epoch, nothing but training."""
    features: list[dict[str, object]] = [{"name": f"t{j}"} for j in range(len(sizes))]
    features += [{"name": f"d{j}", "kind": "numeric"} for j in range(DENSE)]
    return {
        "name": "large-tables",
        "data": {
            "source": {"interactions": str(folder / "tables.parquet")},
            "user": None,
            "item": None,
            "time": None,
            "labels": {"click": {"column": "label"}},
            "split": {"by": "column", "column": "split"},
        },
        "features": features,
        "embedding": {
            "name": "hashing",
            "dim": DIM,
            "options": {"rows": {f"t{j}": size for j, size in enumerate(sizes)}},
        },
        "ranker": {"name": "deepfm", "options": {"hidden": HIDDEN, "fm_dim": DIM}},
        "training": {"epochs": 1, "batch_size": 1024, "calibration": "none", "early_stopping": {"metric": "none"}},
    }
