"""Our prepared rows as plain arrays, so that everybody trains on the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.data.prepared import Prepared


def export(prepared: Prepared, path: Path) -> Path:
    """Writes one .npz: for each split `<split>/<feature>` int64 [n], `<split>/<sequence>` int64 [n, max_length] with
    `<split>/<sequence>.length` int64 [n], `<split>/label` float32 [n] and `<split>/user` int64 [n]; `sizes/<space>` is
    the number of ids of a space, 0 among them.

    An id is its place in the training split's vocabulary plus one; 0 is an unknown id and the padding behind a history.
    Rows are in the order of time, histories newest first. Single-valued features and sequences only.
    """
    arrays: dict[str, np.ndarray] = {}
    for space, statistics in prepared.statistics.items():
        arrays[f"sizes/{space}"] = np.asarray(statistics.size + 1)
    for split, count in prepared.rows.items():
        if count:
            arrays.update({f"{split}/{name}": values for name, values in _split(prepared, split).items()})
    np.savez(path, **arrays)
    return path


def _split(prepared: Prepared, split: str) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for batch in prepared.batches(split, 8192):
        for name, jagged in batch.jagged().items():
            feature = prepared.schema[name]
            rows = prepared.statistics[feature.space].rows(jagged.values()) + 1
            if feature.kind == "sequence":
                lengths = jagged.lengths().to(torch.int64)
                parts.setdefault(f"{name}.length", []).append(lengths.numpy())
                rows = _padded(rows, lengths, feature.max_length)
            parts.setdefault(name, []).append(rows.numpy())
        parts.setdefault("label", []).append(next(iter(batch.labels.values())).numpy())
        if batch.user_key is not None:
            parts.setdefault("user", []).append(batch.user_key.numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _padded(rows: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """int64 [T] by rows -> [n, width], zeros behind."""
    keep = torch.arange(width) < lengths[:, None]
    padded = torch.zeros(len(lengths), width, dtype=torch.int64)
    padded[keep] = rows
    return padded
