"""Trains the encoder that finds candidates, and measures what it finds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from engine.batch import Batch
from engine.components import Loss, Sampler
from engine.config import Config, OptimizerConfig
from engine.errors import DataError, SchemaError
from engine.plugins import Plugins
from engine.retrieval import (
    EncoderModel,
    build_encoder_model,
    item_columns,
    retrieval_section,
    similarity,
)
from engine.tables import unallocated_tables
from engine.training.distributed import average_gradients, join, shard
from engine.training.optim import Optimizers
from engine.training.recall import encode_catalogue, evaluate

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
    with unallocated_tables():
        model = build_encoder_model(config, prepared.statistics, plugins)
    rates = OptimizerConfig(embedding_lr=section.lr, dense_lr=section.lr)
    sharded = shard(model, config.training.sharding, rates, world)
    steps = prepared.steps("train", section.batch_size, positives_only=True)
    if not steps:
        raise DataError("retrieval needs positives in the training split; there are none")
    optimizers = Optimizers(sharded, rates, steps * section.epochs)
    loss_class = plugins.get("losses", section.loss.name)
    loss = loss_class(loss_class.Options(**section.loss.options)).to(world.device)
    sampler_class = plugins.get("samplers", section.sampler.name)
    options = sampler_class.Options(**section.sampler.options)
    sampler = sampler_class(options, prepared.item_counts, config.seed * 1_000_003 + world.rank)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    model.train()
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
            optimizers.begin(done)
            torch.manual_seed((config.seed * 1_000_003 + done) * 1_009 + world.rank)
            value = _loss(sharded, batch, prepared, sampler, loss, section.temperature)
            value.backward()
            mean_loss += float(average_gradients(optimizers.parameters, value.detach(), world)) / steps
            optimizers.step()
            done += 1
            if progress is not None and done % 16 == 0:
                progress("retrieval", done / (steps * section.epochs))
        log.info("retrieval: epoch %d of %d, loss %.4f", epoch + 1, section.epochs, mean_loss)
    frozen = model.freeze()
    if world.rank > 0:
        return RetrievalResult(frozen, np.empty((0, frozen.output_dim), np.float32), {})
    frozen = frozen.cpu()
    vectors = encode_catalogue(frozen, prepared)
    found = {"loss": mean_loss, "epochs": float(section.epochs)} | evaluate(frozen, prepared, vectors)
    if progress is not None:
        progress("retrieval", 1.0)
    return RetrievalResult(frozen, vectors, found)


def _loss(
    model: nn.Module, batch: Batch, prepared: Prepared, sampler: Sampler, loss: Loss, temperature: float
) -> Tensor:
    """One batch of positives against its sampled items. A positive that the catalogue does not list weighs nothing."""
    assert batch.item_key is not None
    rows = torch.from_numpy(prepared.catalogue.rows_of(batch.item_key.numpy()))
    if (unknown := rows < 0).any():
        weight = torch.ones(len(rows)) if batch.weight is None else batch.weight
        batch.weight = torch.where(unknown, 0.0, weight)
        rows = rows.clamp(min=0)
    items, log_q = sampler.sample(rows)
    device = next(model.parameters()).device
    mask = false_negatives(rows, items, batch.user_key)
    sampled = _with_items(batch, prepared, items.numpy()).to(device)
    users, vectors = model(sampled)
    logits = similarity(users, vectors) / temperature
    labels = torch.arange(len(users), device=device)
    return loss(logits, labels, sampled.weight, log_q=log_q.to(device), mask=mask.to(device))


def false_negatives(positives: Tensor, items: Tensor, users: Tensor | None) -> Tensor:
    """Which columns are no negatives of which rows: items that the row's user likes elsewhere in this batch.

    positives int64 [B], items int64 [M] whose first B are the positives, users int64 [B] (None: all different) ->
    bool [B, M], false at a row's own positive.
    """
    own = torch.arange(len(positives))
    distinct, item = items.unique(return_inverse=True)
    user = own if users is None else users.unique(return_inverse=True)[1]
    liked = np.zeros((len(positives), len(distinct)), dtype=bool)  # there are no more users than rows
    liked[user.numpy(), item[: len(positives)].numpy()] = True
    mask = torch.from_numpy(liked.take(item.numpy(), axis=1)).index_select(0, user)
    mask[own, own] = False
    return mask


def _with_items(batch: Batch, prepared: Prepared, rows: np.ndarray) -> Batch:
    """The batch's users, each of whom meets every one of these rows of the catalogue."""
    encoder = prepared.encoder
    ids, numbers = item_columns(encoder, prepared.catalogue, rows)
    parts = batch.jagged()
    for feature in encoder.schema.embedded:
        if feature.from_request:
            values, lengths = parts[feature.name].values(), parts[feature.name].lengths()
            ids[feature.name] = (values.numpy(), lengths.numpy())
    asked = [f for f in encoder.schema.dense if f.from_request]
    numbers |= {f.name: batch.dense_user[:, j].numpy() for j, f in enumerate(asked)}
    made = encoder.assemble(ids, numbers, batch.users, len(rows))
    made.weight = batch.weight
    return made
