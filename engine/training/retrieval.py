"""Trains the encoder that finds candidates, and measures what it finds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.config import Config
from engine.errors import DataError, SchemaError
from engine.plugins import Plugins
from engine.retrieval import EncoderModel, retrieval_section
from engine.training.distributed import join
from engine.training.recall import encode_catalogue, evaluate
from engine.training.retrieval_step import RetrievalStep

if TYPE_CHECKING:
    from engine.data.prepared import Prepared

log = logging.getLogger("plexrank.training")


@dataclass
class RetrievalResult:
    """A trained encoder.

    model: frozen. item_vectors: float32 [items, D] of the whole catalogue by row. metrics: recall@k, ndcg@k and mrr
    over the test part's users, those of the popularity baseline under `popular/...`, the last epoch's `loss`, `epochs`.
    On all processes but the first the model has no weights, and vectors and metrics are empty.
    """

    model: EncoderModel
    item_vectors: np.ndarray
    metrics: dict[str, float]


def train_retrieval(
    config: Config,
    prepared: Prepared,
    *,
    plugins: Plugins,
    progress: Callable[[str, float], None] | None = None,
) -> RetrievalResult:
    """Trains on the positives of the training split, then encodes the catalogue and evaluates on the test split.

    progress: called with ("retrieval", share done). The same function for one process and under torchrun, where each
    process takes its rows of every batch and negatives of its own. DataError if there is no positive, SchemaError
    without users or items.
    """
    section = retrieval_section(config)
    if config.data.user is None or config.data.item is None:
        raise SchemaError("retrieval needs the columns data.user and data.item; one of them is null")
    world = join()
    steps = prepared.steps("train", section.batch_size, positives_only=True)
    if not steps:
        raise DataError("retrieval needs positives in the training split; there are none")
    core = RetrievalStep(config, prepared.statistics, plugins, world, steps * section.epochs)
    sampler = core.sampler(prepared.item_counts)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    core.model.train()
    done, mean_loss = 0, 0.0
    if progress is not None:
        progress("retrieval", 0.0)
    for epoch in range(section.epochs):
        batches = prepared.batches(
            "train", section.batch_size, shuffle_seed=config.seed + epoch, rank=world.rank, world=world.size,
            positives_only=True,
        )  # fmt: skip
        mean_loss = 0.0
        for batch in batches:
            assert batch.item_key is not None
            rows = torch.from_numpy(prepared.catalogue.rows_of(batch.item_key.numpy()))
            mean_loss += core(core.sample(batch, rows, sampler, prepared.encoder, prepared.catalogue), done) / steps
            done += 1
            if progress is not None and done % 16 == 0:
                progress("retrieval", done / (steps * section.epochs))
        log.info("retrieval: epoch %d of %d, loss %.4f", epoch + 1, section.epochs, mean_loss)
    frozen = core.model.freeze()
    if world.rank > 0:
        return RetrievalResult(frozen, np.empty((0, frozen.output_dim), np.float32), {})
    frozen = frozen.cpu()
    vectors = encode_catalogue(frozen, prepared)
    found = {"loss": mean_loss, "epochs": float(section.epochs)} | evaluate(frozen, prepared, vectors)
    if progress is not None:
        progress("retrieval", 1.0)
    return RetrievalResult(frozen, vectors, found)
