"""A world small enough to train in a second: planted tastes, ragged histories, everything from one seed.

`python -m tests.training.small JOB OUT` runs a job of the multi-process and kill tests (also under torchrun).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.batch import Batch, keyed_jagged
from engine.config import Config
from engine.data.statistics import IdStatistics
from engine.hashing import fingerprints

USERS, ITEMS, TAGS = 40, 60, 6
ROWS = {"train": 500, "validation": 150, "test": 150}


def small_config(**sections: Any) -> Config:
    """DIN over `full`; `sections` replace whole sections of the configuration, `training` is merged."""
    training = {"epochs": 2, "batch_size": 64, "threads": 1, "early_stopping": {"metric": "none"}}
    return Config.model_validate(
        {
            "name": "small",
            "data": {"source": {"interactions": "none"}, "labels": {"click": {"column": "click"}}},
            "features": [
                {"name": "user", "side": "user"},
                {"name": "age", "side": "user", "kind": "numeric"},
                {"name": "item"},
                {"name": "tags", "kind": "multi"},
                {"name": "history", "kind": "sequence", "of": "item"},
            ],
            "embedding": {"name": "full", "dim": 8},
            "interest": {"name": "din"},
            "ranker": {"name": "mlp", "options": {"hidden": [16]}},
            **sections,
            "training": {**training, **sections.get("training", {})},
        }
    )


def statistics_of(ids: range) -> IdStatistics:
    """Every id seen twice."""
    return IdStatistics(np.sort(fingerprints(ids)), np.full(len(ids), 2, dtype=np.int64))


class SmallPrepared:
    """What training needs of `engine.data.prepared.Prepared`, from memory.

    delay: seconds before each training batch, so that a test can strike in the middle of a run.
    """

    def __init__(self, *, tasks: tuple[str, ...] = ("click",), delay: float = 0.0, rows: dict[str, int] | None = None):
        self.rows = dict(rows or ROWS)
        self.tasks = tasks
        self.delay = delay
        self.statistics = {
            "user": statistics_of(range(USERS)),
            "item": statistics_of(range(ITEMS)),
            "tags": statistics_of(range(TAGS)),
        }
        rng = np.random.default_rng(7)
        total = sum(self.rows.values())
        self.user, self.item = rng.integers(0, USERS, total), rng.integers(0, ITEMS, total)
        self.age = rng.normal(size=total).astype(np.float32)
        self.tags = [rng.integers(0, TAGS, rng.integers(0, 3)) for _ in range(total)]
        self.history = [rng.integers(0, ITEMS, rng.integers(0, 9)) for _ in range(total)]
        liked = (self.user + self.item) % 3 == 0
        self.labels = (rng.random(total) < np.where(liked, 0.8, 0.3)).astype(np.float32)

    def steps(self, split: str, batch_size: int) -> int:
        return -(-self.rows[split] // batch_size)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> Iterator[Batch]:
        first = {"train": 0, "validation": self.rows["train"]}.get(split, self.rows["train"] + self.rows["validation"])
        order = first + np.arange(self.rows[split])
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        for start in range(start_step * batch_size, self.rows[split], batch_size):
            if split == "train" and self.delay:
                time.sleep(self.delay)
            yield self.batch(order[start : start + batch_size][rank::world])

    def batch(self, rows: np.ndarray) -> Batch:
        def ragged(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            chosen = [lists[r] for r in rows]
            values = np.concatenate([*chosen, np.empty(0, np.int64)])
            return fingerprints(values), np.array([len(c) for c in chosen], dtype=np.int64)

        labels = torch.from_numpy(self.labels[rows])
        return Batch(
            ids=keyed_jagged(
                {
                    "user": (fingerprints(self.user[rows]), None),
                    "item": (fingerprints(self.item[rows]), None),
                    "tags": ragged(self.tags),
                    "history": ragged(self.history),
                }
            ),
            dense_user=torch.from_numpy(self.age[rows])[:, None],
            dense_item=torch.zeros(len(rows), 0),
            user_of_target=torch.arange(len(rows)),
            labels=dict.fromkeys(self.tasks, labels),
            user_key=torch.from_numpy(fingerprints(self.user[rows])),
            item_key=torch.from_numpy(fingerprints(self.item[rows])),
        )


def serving_batch(candidates: int, history: int = 5) -> Batch:
    """One user, many candidates."""
    return Batch(
        ids=keyed_jagged(
            {
                "user": (fingerprints([3]), None),
                "item": (fingerprints(range(candidates)), None),
                "tags": (fingerprints(range(candidates)), np.ones(candidates, np.int64)),
                "history": (fingerprints(range(history)), np.array([history])),
            }
        ),
        dense_user=torch.full((1, 1), 0.5),
        dense_item=torch.zeros(candidates, 0),
        user_of_target=torch.zeros(candidates, dtype=torch.int64),
    )


def _worlds(out: Path) -> None:
    """At two processes: table-wise and row-wise from the start, a first epoch, and a second after one at world 1."""
    from engine.plugins import installed
    from engine.training.loop import train

    for sharding in ("table_wise", "row_wise", "planner"):
        config = small_config(training={"sharding": {"type": sharding}})
        result = train(config, SmallPrepared(), out / sharding, plugins=installed())  # type: ignore[arg-type]
        if result.test is not None:
            numbers = {"history": result.metrics["history"], "auc": result.metrics["auc"]}
            (out / f"{sharding}.json").write_text(json.dumps(numbers))
            np.save(out / f"{sharding}.npy", result.test.logits["click"])
    train(small_config(training={"epochs": 1}), SmallPrepared(), out / "begun-at-2", plugins=installed())  # type: ignore[arg-type]
    config = small_config(training={"sharding": {"type": "row_wise"}})
    result = train(config, SmallPrepared(), out / "begun-at-1", plugins=installed(), resume=True)  # type: ignore[arg-type]
    if result.test is not None:
        np.save(out / "begun-at-1.npy", result.test.logits["click"])
    l2 = small_config(training={"epochs": 1, "mini_batch_aware_l2": 0.1, "optimizer": {"clip_norm": 0.5}})
    result = train(l2, SmallPrepared(rows={"train": 65, "validation": 3, "test": 20}), out / "l2", plugins=installed())  # type: ignore[arg-type]
    if result.test is not None:
        np.save(out / "l2.npy", result.test.logits["click"])


def _slow(out: Path) -> None:
    """A run that checkpoints every third step and waits before each, to be killed."""
    from engine.plugins import installed
    from engine.training.loop import train

    config = small_config(training={"checkpoint": {"every_steps": 3, "keep": 2}})
    train(config, SmallPrepared(delay=0.1), out, plugins=installed())  # type: ignore[arg-type]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    {"worlds": _worlds, "slow": _slow}[sys.argv[1]](Path(sys.argv[2]))
