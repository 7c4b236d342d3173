"""One step of training, the same in batch and from the stream: sharded model, optimizers, loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.components import DelayedFeedback, EmbeddingMethod, Loss
from engine.config import Config
from engine.errors import PlexrankError
from engine.model import build_model
from engine.plugins import Plugins
from engine.tables import TableEmbedding, unallocated_tables
from engine.training.distributed import World, average_gradients, shard
from engine.training.optim import Optimizers
from engine.training.regularisation import MiniBatchAwareL2

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics


class TrainingError(PlexrankError):
    """Training cannot go on: the loss is not a finite number."""


class TrainStep:
    """The model of a configuration under DMP, and what changes it.

    steps: how many there will be, for the course of the learning rates.
    """

    def __init__(
        self, config: Config, statistics: Mapping[str, IdStatistics], plugins: Plugins, world: World, steps: int
    ) -> None:
        training = config.training
        self.seed, self.plugins, self.world = config.seed, plugins, world
        with unallocated_tables():
            self.model = build_model(config, statistics, plugins)
        self.sharded = shard(self.model, training.sharding, training.optimizer, world)
        self.optimizers = Optimizers(self.sharded, training.optimizer, steps)
        loss = plugins.get("losses", training.loss.name)
        self.loss: Loss = loss(loss.Options(**training.loss.options)).to(world.device)
        method = self.model.embedding
        assert isinstance(method, EmbeddingMethod)
        self.method: EmbeddingMethod = method
        self.l2 = None
        if training.mini_batch_aware_l2 > 0:
            self.l2 = MiniBatchAwareL2(method.features, statistics, training.mini_batch_aware_l2, world)

    def __call__(
        self,
        batch: Batch,
        number: int,
        *,
        where: str = "",
        offset: float = 0.0,
        gaps: bool = False,
        feedback: Mapping[str, DelayedFeedback] | None = None,
    ) -> tuple[float, int]:
        """One optimizer step, the `number`-th from 0. -> the mean loss of the batch over all processes, and its rows.

        offset: is added to the logits before the loss, which it corrects for a sampling of the rows.
        gaps: labels may be NaN: those rows say nothing of that task. feedback: task -> what corrects its loss for
        positives that come later than their negatives. TrainingError where the loss is no finite number.
        """
        if self.world.device.type != "cpu":
            batch = batch.to(self.world.device, non_blocking=True)
        self.optimizers.begin(number)
        reseed(self._seed(number), self.world.device)
        rows, share = self._share(batch)
        embedded = self.model.embed(batch)
        logits = self.model.score(batch, embedded)
        loss = self._mean_loss(logits, batch, offset, gaps, feedback or {}) * share
        whole = loss if self.l2 is None else loss + self.world.size * self.l2.penalty(batch.ids, embedded)
        whole.backward()
        mean = float(average_gradients(self.optimizers.parameters, loss.detach(), self.world))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {number + 1}{where}: lower "
                "training.optimizer.embedding_lr and dense_lr, set clip_norm, or look for huge values in the numeric "
                "features with `plexrank validate --data`"
            )
        self.optimizers.step()
        if self.plugins.listens("on_train_step"):
            self.plugins.notify("on_train_step", step=number + 1, metrics={"loss": mean})
        return mean, rows

    def _seed(self, number: int) -> int:
        """Dropout's random numbers follow from the step, so a resumed run draws the same, at any step."""
        return (self.seed * 0x9E3779B97F4A7C15 + number * 0x10001 + self.world.rank) % (1 << 63)

    def _share(self, batch: Batch) -> tuple[int, float]:
        """(rows of the batch over all processes, what this process's mean loss counts for in the mean of means).

        Processes may have unequal numbers of rows, or weights; the mean over all rows is wanted.
        """
        if self.world.size == 1:
            return batch.targets, 1.0
        mine = float(batch.targets if batch.weight is None else batch.weight.sum())
        sums = torch.tensor([float(batch.targets), mine], dtype=torch.float64, device=self.world.device)
        torch.distributed.all_reduce(sums)
        rows, weight = sums.tolist()
        return int(rows), self.world.size * mine / weight if weight > 0 else 0.0

    def _mean_loss(
        self,
        logits: dict[str, Tensor],
        batch: Batch,
        offset: float,
        gaps: bool,
        feedback: Mapping[str, DelayedFeedback],
    ) -> Tensor:
        """The sum of the tasks' mean losses over this process's rows."""
        losses = []
        for task in self.model.schema.tasks:
            scores, labels, weight = logits[task], batch.labels[task], batch.weight
            if gaps and bool((missing := labels.isnan()).any()):
                known = ~missing
                scores, labels = scores[known], labels[known]
                weight = None if weight is None else weight[known]
            if (late := feedback.get(task)) is not None:
                more = late.weight(scores, labels)
                weight = weight if more is None else more if weight is None else weight * more
                scores = late.logits(scores)
            if offset:
                scores = scores + offset
            losses.append(self.loss(scores, labels, weight) if len(labels) or not gaps else scores.sum())
        return torch.stack(losses).sum()

    # ------------------------------------------------------------------------------------------------- state
    def weights(self) -> dict[str, Any]:
        """The model's tensors under `model/`, whole or sharded, for a checkpoint."""
        return {f"model/{name}": value for name, value in self.model.state_dict().items()}

    def tensors(self) -> dict[str, Any]:
        """`weights`, and the optimizers' state under `tables/` and `dense/`."""
        return {
            **self.weights(),
            **{f"tables/{name}": value for name, value in self.optimizers.table_state()},
            **{f"dense/{name}": value for name, value in self.optimizers.dense_state().items()},
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a bundle keeps of the optimizers; every process calls this, and process 0 gets all of it.

        `tables/<table>`: row-wise Adagrad's sums float32 [rows]; `dense/<parameter>/<exp_avg, exp_avg_sq or step>`:
        Adam's moments; `model/<name>`: what the frozen form of an embedding lacks. At one process they may share
        memory with the optimizers'.
        """
        state = self._gathered_sums() if isinstance(self.method, TableEmbedding) else {}
        state |= {f"dense/{name}": value.cpu() for name, value in self.optimizers.dense_state().items()}
        if isinstance(self.method, TableEmbedding):
            return state
        kept = self.method.freeze().state_dict()
        for name, value in self.method.state_dict().items():
            if name not in kept or kept[name].shape != value.shape:
                state[f"model/embedding.{name}"] = value.cpu()
        return state

    def table_sums(self) -> dict[str, Tensor]:
        """table -> this process's rows of row-wise Adagrad's sums float32; writing to them changes the state."""
        return {_table(n): v.local_shards()[0].tensor for n, v in self.optimizers.table_state() if v.local_shards()}

    def _gathered_sums(self) -> dict[str, Tensor]:
        """`tables/<table>` of all processes; a process may know nothing of the tables that others hold."""
        if self.world.size == 1:
            return {f"tables/{name}": sums for name, sums in self.table_sums().items()}
        assert isinstance(self.method, TableEmbedding)
        mine = {_table(name): value.local_shards() for name, value in self.optimizers.table_state()}
        state = {}
        for name, table in sorted(self.method.tables.items()):
            whole = torch.zeros(table.rows, device=self.world.device)
            for part in mine.get(name, []):
                first = part.metadata.shard_offsets[0]
                whole[first : first + len(part.tensor)] = part.tensor
            torch.distributed.reduce(whole, dst=0)
            state[f"tables/{name}"] = whole.cpu()
        return state


def _table(name: str) -> str:
    """`embedding.groups.values1.embedding_bags.t_user.weight/...` -> `t_user`."""
    return name.rpartition("/")[0].split(".")[-2]


def reseed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the devices in use only: that asks every kind of device, at a cost each step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
