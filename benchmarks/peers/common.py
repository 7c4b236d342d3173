"""What the peers' scripts share. Runs in the peers' environment: numpy, torch, scikit-learn, nothing of this engine."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

torch.set_num_threads(1)


def options() -> dict[str, Any]:
    """The JSON object of the last argument."""
    found: dict[str, Any] = json.loads(sys.argv[-1])
    torch.manual_seed(found["seed"])
    np.random.seed(found["seed"])
    return found


class Rows:
    """The exported arrays of one split."""

    def __init__(self, path: str, split: str) -> None:
        with np.load(path) as stored:
            self.columns = {k.split("/", 1)[1]: stored[k] for k in stored.files if k.startswith(f"{split}/")}
            self.sizes = {k.split("/", 1)[1]: int(stored[k]) for k in stored.files if k.startswith("sizes/")}
        self.label = self.columns.pop("label")
        self.user = self.columns.pop("user", None)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


class Slices:
    """Batches cut from tensors in memory: as cheap as loading can be, so that no peer is judged by its loader."""

    def __init__(self, tensors: dict[str, torch.Tensor], batch_size: int, shuffle: bool) -> None:
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle
        self.rows = len(next(iter(tensors.values())))

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(self.rows) if self.shuffle else torch.arange(self.rows)
        for places in order.split(self.batch_size):
            yield {name: values[places] for name, values in self.tensors.items()}


class Clock:
    """Wall and processor time of what runs inside `with`, added up."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """Mean AUC of the users with both classes, weighted by their rows."""
    total = rows = 0.0
    order = np.argsort(users, kind="stable")
    edges = np.flatnonzero(np.diff(users[order])) + 1
    for part in np.split(order, edges):
        if 0 < labels[part].sum() < len(part):
            total += roc_auc_score(labels[part], scores[part]) * len(part)
            rows += len(part)
    return total / rows


def figures(rows: Rows, probabilities: np.ndarray) -> dict[str, float]:
    p = np.clip(np.asarray(probabilities, dtype=np.float64).reshape(-1), 1e-7, 1 - 1e-7)
    found = {"auc": float(roc_auc_score(rows.label, p)), "logloss": float(log_loss(rows.label, p))}
    return found if rows.user is None else {**found, "gauc": gauc(rows.label, p, rows.user)}


def answer(package: str, rows: int, clock: Clock, **more: Any) -> None:
    """Prints the result; `clock` has run while the rows were trained, not while they were validated."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "peer": f"{package} {version(package)}",
                "rows_per_second": rows / clock.wall,
                "rows_per_cpu_second": rows / clock.cpu,
                "peak_rss_mb": peak,
                **more,
            }
        )
    )
