"""Predictions of a model over a split, and the figures of merit that come from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine import metrics
from engine.batch import Batch
from engine.training.distributed import World, gather_all


@dataclass(frozen=True)
class Predictions:
    """Rows of a split. logits, labels: task -> float32 [n]. user_key, item_key: int64 [n] fingerprints, or None."""

    logits: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    user_key: np.ndarray | None = None
    item_key: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.logits.values()))) if self.logits else 0


@torch.no_grad()  # not inference_mode: the fused kernels are registered with autograd only
def predict(model: nn.Module, batches: Iterable[Batch], world: World | None = None) -> Predictions:
    """The model's logits for each batch, in evaluation mode; the model's mode is put back.

    world: gather the rows of all processes, one process's behind another's, on each of them.
    """
    was_training = model.training
    model.eval()
    collected: dict[str, list[Tensor]] = {}
    for batch in batches:
        if world is not None and world.device.type != "cpu":
            batch = batch.to(world.device, non_blocking=True)
        for task, logits in model(batch).items():
            collected.setdefault(f"logits/{task}", []).append(logits)
            collected.setdefault(f"labels/{task}", []).append(batch.labels[task])
        for key, values in (("user", batch.user_key), ("item", batch.item_key)):
            if values is not None:
                collected.setdefault(key, []).append(values)
    model.train(was_training)
    arrays = {name: _joined(parts, world) for name, parts in collected.items()}
    tasks = [name.removeprefix("logits/") for name in arrays if name.startswith("logits/")]
    return Predictions(
        logits={t: arrays[f"logits/{t}"] for t in tasks},
        labels={t: arrays[f"labels/{t}"] for t in tasks},
        user_key=arrays.get("user"),
        item_key=arrays.get("item"),
    )


def _joined(parts: list[Tensor], world: World | None) -> np.ndarray:
    values = torch.cat(parts)
    return (values if world is None else gather_all(values, world)).cpu().numpy()


def figures(predictions: Predictions, task: str) -> dict[str, float | None]:
    """auc, gauc, logloss, ne, ece of one task; None where a figure is not defined (one class, no users)."""
    labels, logits = predictions.labels[task], predictions.logits[task]
    probabilities = metrics.sigmoid(logits)
    return {
        "auc": metrics.auc(labels, logits),
        "gauc": metrics.gauc(labels, logits, predictions.user_key),
        "logloss": metrics.logloss(labels, probabilities),
        "ne": metrics.normalised_entropy(labels, probabilities),
        "ece": metrics.ece(labels, probabilities),
    }


def better(metric: str, new: float, old: float) -> bool:
    """Whether `new` is the better value of an early-stopping metric."""
    return new < old if metric == "logloss" else new > old


def named(values: Mapping[str, float | None]) -> str:
    """`auc 0.7123 logloss 0.6101` for a log line."""
    return " ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
