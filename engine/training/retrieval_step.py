"""One step of an encoder's training, the same in batch and from the stream: sharded model, optimizers, sampled loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.components import EmbeddingMethod, Loss, Sampler
from engine.config import Config, OptimizerConfig
from engine.plugins import Plugins
from engine.retrieval import build_encoder_model, item_columns, retrieval_section, similarity
from engine.tables import unallocated_tables
from engine.training.distributed import World, average_gradients, shard
from engine.training.optim import Optimizers

if TYPE_CHECKING:
    from engine.catalogue import ArrowCatalogue
    from engine.data.encoder import FeatureEncoder
    from engine.data.statistics import IdStatistics


@dataclass(frozen=True, eq=False)
class Sampled:
    """B users, each of whom meets the same M items, the first B of them their own.

    batch: U = B, N = M. items int64 [M]: catalogue rows. log_q float32 [M]. mask bool [B, M]: no negative of the user.
    """

    batch: Batch
    items: Tensor
    log_q: Tensor
    mask: Tensor


class RetrievalStep:
    """The encoder of a configuration under DMP, and what changes it.

    steps: how many there will be, for the course of the learning rates.
    """

    def __init__(
        self, config: Config, statistics: Mapping[str, IdStatistics], plugins: Plugins, world: World, steps: int
    ) -> None:
        section = retrieval_section(config)
        with unallocated_tables():
            self.model = build_encoder_model(config, statistics, plugins)
        rates = OptimizerConfig(embedding_lr=section.lr, dense_lr=section.lr)
        self.sharded = shard(self.model, config.training.sharding, rates, world)
        self.optimizers = Optimizers(self.sharded, rates, steps)
        loss_class = plugins.get("losses", section.loss.name)
        self.loss: Loss = loss_class(loss_class.Options(**section.loss.options)).to(world.device)
        self._sampler_class = plugins.get("samplers", section.sampler.name)
        self._sampler_options = self._sampler_class.Options(**section.sampler.options)
        self._temperature = section.temperature
        self._seed, self._world = config.seed, world
        method = self.model.embedding
        assert isinstance(method, EmbeddingMethod)
        self.method: EmbeddingMethod = method

    def sampler(self, counts: np.ndarray) -> Sampler:
        """The configuration's sampler over items of these counts int64 [items], with a seed of this process's own."""
        sampler: Sampler = self._sampler_class(self._sampler_options, counts, self._seed * 1_000_003 + self._world.rank)
        return sampler

    def sample(
        self, batch: Batch, rows: Tensor, sampler: Sampler, encoder: FeatureEncoder, catalogue: ArrowCatalogue
    ) -> Sampled:
        """The batch's positives, whose items are these rows int64 [B] of the catalogue, among items to tell them from.

        A positive that the catalogue does not list (-1) weighs nothing.
        """
        weight = batch.weight
        if bool((unknown := rows < 0).any()):
            weight = torch.where(unknown, 0.0, torch.ones(len(rows)) if weight is None else weight)
            rows = rows.clamp(min=0)
        items, log_q = sampler.sample(rows)
        mask = false_negatives(rows, items, batch.user_key)
        return Sampled(_with_items(batch, weight, encoder, catalogue, items.numpy()), items, log_q, mask)

    def __call__(self, sampled: Sampled, number: int) -> float:
        """One optimizer step, the `number`-th from 0 -> the mean loss over all processes, in nats."""
        device = self._world.device
        self.optimizers.begin(number)
        torch.manual_seed(self.seed(number))
        batch = sampled.batch.to(device)
        users, vectors = self.sharded(batch)
        logits = similarity(users, vectors) / self._temperature
        labels = torch.arange(len(users), device=device)
        value = self.loss(logits, labels, batch.weight, log_q=sampled.log_q.to(device), mask=sampled.mask.to(device))
        value.backward()
        mean = float(average_gradients(self.optimizers.parameters, value.detach(), self._world))
        self.optimizers.step()
        return mean

    def seed(self, number: int) -> int:
        """Of the random numbers of a step."""
        return (self._seed * 1_000_003 + number) * 1_009 + self._world.rank

    def tensors(self) -> dict[str, Any]:
        """The model's tensors under `model/` the optimizers' state under `tables/` and `dense/`; whole or sharded."""
        return {
            **{f"model/{name}": value for name, value in self.model.state_dict().items()},
            **{f"tables/{name}": value for name, value in self.optimizers.table_state()},
            **{f"dense/{name}": value for name, value in self.optimizers.dense_state().items()},
        }


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


def _with_items(
    batch: Batch, weight: Tensor | None, encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray
) -> Batch:
    """The batch's users, each of whom meets every one of these rows of the catalogue."""
    ids, numbers = item_columns(encoder, catalogue, rows)
    parts = batch.jagged()
    for feature in encoder.schema.embedded:
        if feature.from_request:
            values, lengths = parts[feature.name].values(), parts[feature.name].lengths()
            ids[feature.name] = (values.numpy(), lengths.numpy())
    asked = [f for f in encoder.schema.dense if f.from_request]
    numbers |= {f.name: batch.dense_user[:, j].numpy() for j, f in enumerate(asked)}
    made = encoder.assemble(ids, numbers, batch.users, len(rows))
    made.weight = weight
    return made
