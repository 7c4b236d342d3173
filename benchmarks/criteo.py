"""Criteo, the first 80,000 impressions (chunks 1-3 train, 4 tests): networks beside logistic regression; compression.

60,000 rows and some 180,000 distinct ids are few for a network: tuned logistic regression is a strong opponent here,
and a second epoch already overfits. All 39 columns are ids (in this file the counts are hashed too).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lines import Report, arguments, one_thread

one_thread()

from scipy.sparse import csr_matrix  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import log_loss, roc_auc_score  # noqa: E402

from benchmarks.multiplexing import fair_hash, unified  # noqa: E402
from benchmarks.runs import CONFIGS, Measured, mean_of, run, spread  # noqa: E402

CONFIG = CONFIGS / "criteo-80k.yaml"
FILE = Path("criteo-80k", "criteo80k.parquet")
RANKERS = ("dcnv2", "dlrm", "deepfm", "mlp")
NETWORKS = ("dcnv2", "dlrm", "deepfm")
STRENGTHS = (0.02, 0.05, 0.1, 0.2)
"""Inverse strengths of the regression's L2 that validation chooses from."""


class Runs:
    """Trains variants of the configuration on the same seeds."""

    def __init__(self, report: Report, seeds: int, quick: bool) -> None:
        self.report, self.seeds = report, seeds
        self.common = {"data.dataset.options.rows": 8000, "training.epochs": 1} if quick else {}

    def one(self, overrides: Mapping[str, Any], seed: int) -> Measured:
        return run(CONFIG, {**self.common, **overrides}, seed)

    def mean(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        runs = []
        for seed in range(1, self.seeds + 1):
            runs.append(self.one(overrides, seed))
            self.report.tell(f"{name}, seed {seed}: AUC {runs[-1].figures['auc']:.4f}")
        means = mean_of(runs, "auc", "logloss", "embedding_bytes")
        return {**means, "auc_sd": spread([r.figures["auc"] for r in runs]), "best_epochs": [
            r.figures["best_epoch"] for r in runs
        ]}  # fmt: skip


def logistic_regression(one: Measured) -> dict[str, float]:
    """One-hot ids, L2 chosen on the validation rows, then fitted to training and validation together."""
    rows = {split: _one_hot(one, split) for split in ("train", "validation", "test")}
    columns = np.unique(np.concatenate([rows["train"][0], rows["validation"][0]]))
    data = {split: (_matrix(ids, starts, columns), y) for split, (ids, starts, y) in rows.items()}

    def fit(strength: float, *splits: str) -> LogisticRegression:
        x = csr_matrix(np.ones((0, len(columns)))) if not splits else _stack([data[s][0] for s in splits])
        return LogisticRegression(C=strength, max_iter=300).fit(x, np.concatenate([data[s][1] for s in splits]))

    def auc(model: LogisticRegression, split: str) -> float:
        return float(roc_auc_score(data[split][1], model.decision_function(data[split][0])))

    best = max(STRENGTHS, key=lambda c: auc(fit(c, "train"), "validation"))
    model = fit(best, "train", "validation")
    loss = log_loss(data["test"][1], model.predict_proba(data["test"][0])[:, 1])
    return {"auc": auc(model, "test"), "logloss": float(loss), "inverse_l2": best}


def _one_hot(one: Measured, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(one number a value of a column [n * 39], first value of each row [n + 1], labels [n])."""
    values, labels = [], []
    for batch in one.batches(split):
        keys = batch.ids.keys()
        ids = batch.ids.values().numpy().reshape(len(keys), -1)
        salt = np.arange(len(keys), dtype=np.int64)[:, None] * np.int64(0x9E3779B97F4A7C1)
        values.append((ids + salt).T.reshape(-1))
        labels.append(next(iter(batch.labels.values())).numpy())
    y = np.concatenate(labels)
    found = np.concatenate(values)
    return found, np.arange(len(y) + 1) * (len(found) // len(y)), y


def _matrix(ids: np.ndarray, starts: np.ndarray, columns: np.ndarray) -> csr_matrix:
    place = np.minimum(np.searchsorted(columns, ids), len(columns) - 1)
    known = columns[place] == ids
    counts = np.add.reduceat(known, starts[:-1])
    return csr_matrix(
        (np.ones(known.sum()), place[known], np.concatenate([[0], np.cumsum(counts)])), (len(counts), len(columns))
    )


def _stack(parts: list[csr_matrix]) -> csr_matrix:
    from scipy.sparse import vstack

    return csr_matrix(vstack(parts))


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "", argv, seeds=3)
    report = Report("criteo", quick=options.quick)
    folder = os.environ.get("PLEXRANK_DATA")
    if not folder or not (Path(folder) / FILE).exists():
        report.skip("all", f"PLEXRANK_DATA does not name a folder that holds {FILE}")
        return report.end()
    runs = Runs(report, options.seeds, options.quick)
    regression = logistic_regression(runs.one({"ranker.name": "mlp", "training.epochs": 1}, 1))
    report.tell(f"logistic regression: AUC {regression['auc']:.4f}")
    networks = {name: runs.mean(name, {"ranker.name": name}) for name in RANKERS}
    best = max(NETWORKS, key=lambda name: networks[name]["auc"])
    report.line(
        "networks",
        ours={"best": best, **networks[best]},
        peer={"logistic_regression": regression, **networks},
        target="best of DCN-V2, DLRM, DeepFM: AUC >= .768 (a plain network of a sketch: .7646)",
        ok=networks[best]["auc"] >= 0.768,
        best_minus_regression=networks[best]["auc"] - regression["auc"],
        seeds=options.seeds,
    )
    compress(report, runs, best, networks[best])
    return report.end()


def compress(report: Report, runs: Runs, ranker: str, full: Mapping[str, Any]) -> None:
    """`unified` at a tenth and a hundredth of the full tables' bytes, with the same network."""
    for ratio, lookups in ((0.1, (1, 2)), (0.01, (2,))):
        hashed = runs.mean(f"{ratio:.0%} hash", {"ranker.name": ranker, **fair_hash(ratio)})
        narrow = runs.mean(f"{ratio:.0%} narrower", {"ranker.name": ranker, "embedding.dim": 1})
        for count in lookups:
            ours = runs.mean(f"{ratio:.0%} unified {count}", {"ranker.name": ranker, **unified(ratio, count)})
            within = full["auc"] - ours["auc"] <= 0.004
            above = ours["auc"] > hashed["auc"]
            judged = count == 2
            tenth = ratio == 0.1
            report.line(
                f"unified, {count} lookups, {ratio:.0%} of the bytes",
                ours=ours,
                peer={"full": full, "fair_hash": hashed, "narrowest": narrow},
                ratio=ours["embedding_bytes"] / full["embedding_bytes"],
                target=("AUC >= full - .004" if tenth else "AUC > fair hash") if judged else None,
                ok=(within if tenth else above) if judged else None,
                below_full=full["auc"] - ours["auc"],
                better_than_hash=ours["auc"] - hashed["auc"],
                seeds=runs.seeds,
            )


if __name__ == "__main__":
    sys.exit(main())
