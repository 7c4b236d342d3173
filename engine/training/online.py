"""Training that goes on from a bundle, a micro-batch at a time, and knows which rows it changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from engine.batch import Batch
from engine.bundle import Bundle
from engine.config import Config
from engine.config_learning import LearningConfig
from engine.errors import BundleError, ConfigError
from engine.memory import keep_freed_memory
from engine.model import RankingModel
from engine.plugins import Plugins
from engine.streaming.deltas.delta import TableRows
from engine.streaming.join.feedback import feedback_of
from engine.tables import TableEmbedding
from engine.training.distributed import join
from engine.training.step import TrainStep

log = logging.getLogger("plexrank.learning")


class OnlineTrainer:
    """A bundle's ranking model under the same TorchRec code as in batch training, in one process.

    Tables (`embedding.weights.<table>` of the frozen form) are given out by rows; everything else, also the statistics
    of Dice and of batch normalisation (which the stream leaves as they are), is the dense part. An embedding method
    without tables is dense as a whole.
    `step`, not the caller's clock, fixes dropout's random numbers, so equal batches give equal weights, to the last bit
    on one thread. For one thread.
    """

    def __init__(self, bundle: Bundle, learning: LearningConfig, plugins: Plugins) -> None:
        keep_freed_memory()
        world = join()
        if world.size > 1:
            raise ConfigError("learning from the stream runs in one process; share partitions out among several")
        self.bundle = bundle
        self.tasks = bundle.schema.tasks
        self.steps = 0
        self.core = TrainStep(_with_rates(bundle.config, learning), bundle.statistics, plugins, world, 1)
        self.device = world.device
        self._offset = -math.log(learning.join.negatives)
        self._feedback = feedback_of(learning.join, self.tasks, plugins)
        method = self.core.method
        self._tables: dict[str, Tensor] = {}
        if isinstance(method, TableEmbedding):
            self._tables = {n: w[:, : method.tables[n].dim] for n, w, _ in method.local_weights()}
        self._sums = self.core.table_sums()
        self._touched = {name: np.zeros(len(weight), dtype=bool) for name, weight in self._tables.items()}
        self._count = 0
        self._training = False
        self.core.sharded.eval()
        self._scored = self._plain() if isinstance(method, TableEmbedding) else self.core.model
        optimizer = bundle.optimizer()
        self._fill(bundle.frozen_tensors(), optimizer or {})
        if optimizer is None:
            log.warning(
                "%s keeps no optimizer state: row-wise Adagrad starts from zero, so the first steps on each row are as "
                "long as its learning rate; train with training.keep_optimizer: true",
                bundle.path,
            )
        else:
            self._fill_optimizer(optimizer)
        self._sent = self.dense()

    def _plain(self) -> RankingModel:
        """The model with the tables as they are: TorchRec's lookup takes three times as long to score by."""
        model, method = self.core.model, self.core.method
        assert isinstance(method, TableEmbedding)
        return RankingModel(model.schema, method.as_they_are().to(self.device), model.interest, model.ranker)

    @torch.no_grad()
    def _fill(self, frozen: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> None:
        """Puts the bundle's weights into the model. BundleError names what does not fit."""
        for name, weight in self._tables.items():
            weight.copy_(self._fitting(f"embedding.weights.{name}", frozen, weight))
        for name, value in self.core.model.state_dict().items():
            if not isinstance(value, ShardedTensor):
                kept = frozen.get(name)
                source = frozen if kept is not None and kept.shape == value.shape else _renamed(more, "model/")
                value.copy_(self._fitting(name, source, value))

    @torch.no_grad()
    def _fill_optimizer(self, state: Mapping[str, Tensor]) -> None:
        for name, sums in self._sums.items():
            sums.copy_(self._fitting(f"tables/{name}", state, sums))
        for name, value in self.core.optimizers.dense_state().items():
            value.copy_(self._fitting(f"dense/{name}", state, value))

    def _fitting(self, name: str, given: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
        found = given.get(name)
        if found is None or found.shape != wanted.shape:
            is_there = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
            raise BundleError(
                f"{self.bundle.path}: cannot be trained further: tensor {name} {is_there}; train it again with "
                "training.keep_optimizer: true"
            )
        return found

    # ---------------------------------------------------------------------------------------------- training
    def step(self, batch: Batch, labels: np.ndarray, weight: np.ndarray | None = None) -> float:
        """One optimizer step -> the loss, in nats, summed over tasks.

        labels: float32 [N, tasks]; NaN: the row says nothing of that task. weight: float32 [N], >= 0. Where only a
        share r of the negatives is kept (learning.join.negatives), the loss is taken at logits - ln r, so that the
        model's own logits stay those of the whole stream; they stay the truth's under `learning.join.feedback`, too.
        TrainingError where the loss is no finite number.
        """
        if not self._training:
            self.core.sharded.train()
            _hold_statistics(self.core.model)
            self._training = True
        columns = torch.from_numpy(np.ascontiguousarray(labels.T, dtype=np.float32))
        batch = replace(
            batch,
            labels=dict(zip(self.tasks, columns, strict=True)),
            weight=None if weight is None else torch.from_numpy(weight),
        )
        loss, _ = self.core(batch, self.steps, offset=self._offset, gaps=True, feedback=self._feedback)
        self.steps += 1
        if self._tables:
            for table, rows in self.core.method.touched_rows(batch.ids).items():
                self.mark(table, rows.cpu().numpy())
        return loss

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        """task -> logits float32 [N] of the model as it is now, in evaluation mode."""
        if self._training:
            self._scored.eval()
            self._training = False
        logits = self._scored(batch if self.device.type == "cpu" else batch.to(self.device))
        return {task: value.cpu().numpy() for task, value in logits.items()}

    # -------------------------------------------------------------------------------------- what has changed
    @property
    def tables(self) -> dict[str, int]:
        """table -> its rows; empty for a method without tables."""
        return {name: len(weight) for name, weight in self._tables.items()}

    @property
    def touched(self) -> int:
        """Distinct rows, over all tables, that were trained since they were last taken."""
        return self._count

    def mark(self, table: str, rows: np.ndarray) -> None:
        """Counts rows int64 [n] among the touched."""
        seen = self._touched[table]
        rows = rows[~seen[rows]]
        if len(rows):
            rows = np.unique(rows)
            seen[rows] = True
            self._count += len(rows)

    def touched_rows(self) -> dict[str, np.ndarray]:
        """table -> rows touched since they were last taken, int64, ascending; without taking them."""
        found = {name: np.flatnonzero(seen) for name, seen in self._touched.items()}
        return {name: rows for name, rows in found.items() if len(rows)}

    def take_delta(self, *, dense: bool = True) -> tuple[dict[str, TableRows], dict[str, Tensor]]:
        """The touched rows with their values of now, and the dense tensors that changed since they were last taken.

        dense: False leaves the dense part for a later one. What was taken counts as touched no more.
        """
        tables = {name: TableRows(rows, self.rows(name, rows)) for name, rows in self.touched_rows().items()}
        for name, part in tables.items():
            self._touched[name][part.rows] = False
        self._count = 0
        if not dense:
            return tables, {}
        now = self.dense()
        changed = {name: value for name, value in now.items() if not torch.equal(value, self._sent[name])}
        self._sent = now
        return tables, changed

    @torch.no_grad()
    def rows(self, table: str, rows: np.ndarray) -> np.ndarray:
        """Values float32 [n, dim] of rows int64 [n] of a table, a copy."""
        return self._tables[table][torch.from_numpy(rows).to(self.device)].cpu().numpy()

    @torch.no_grad()
    def put_rows(self, table: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Overwrites rows int64 [n] by values float32 [n, dim] and forgets what Adagrad knew of them."""
        where = torch.from_numpy(rows).to(self.device)
        self._tables[table][where] = torch.from_numpy(values).to(self.device)
        self._sums[table][where] = 0.0
        self.mark(table, rows)

    def dense(self) -> dict[str, Tensor]:
        """All of the frozen form's tensors that are no tables, by their names there; copies, on the CPU."""
        model = self.core.model
        parts: dict[str, nn.Module | None] = {"interest": model.interest, "ranker": model.ranker}
        if not self._tables:
            parts["embedding"] = self.core.method.freeze()
        return {
            f"{part}.{name}": value.detach().to("cpu", copy=True)
            for part, module in parts.items()
            if module is not None
            for name, value in module.state_dict().items()
        }

    # --------------------------------------------------------------------------------------------- as a whole
    def frozen(self) -> RankingModel:
        """The form that is stored and served; tables may share memory with the trained ones."""
        return self.core.model.freeze()

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a bundle keeps of the optimizers; may share memory with them."""
        return self.core.optimizer_state()

    def tensors(self) -> dict[str, Any]:
        """Everything that a checkpoint has to hold beside `state`: weights and optimizers' state, not copied."""
        return self.core.tensors()

    def state(self) -> dict[str, np.ndarray]:
        """The rest of the checkpoint: steps, what is touched, and the dense part as it was last taken."""
        touched = {f"touched/{name}": rows for name, rows in self.touched_rows().items()}
        sent = {f"sent/{name}": value.numpy() for name, value in self._sent.items()}
        return {"steps": np.array([self.steps]), **touched, **sent}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes `state` up; the weights were read into `tensors` before."""
        self.steps = int(state["steps"][0])
        for name, seen in self._touched.items():
            seen[:] = False
            seen[state.get(f"touched/{name}", np.empty(0, np.int64))] = True
        self._count = sum(int(seen.sum()) for seen in self._touched.values())
        self._sent = {name: torch.from_numpy(np.array(state[f"sent/{name}"])) for name in self._sent}


def _hold_statistics(model: nn.Module) -> None:
    """Layers that keep running statistics use those, also while they are trained.

    A micro-batch holds a few pages of a few users, whose own statistics are far from everybody's: with them the AUC of
    DIN with Dice fell from .787 to .675 on the synthetic service, without them it rose to .793.
    """
    for module in model.modules():
        if "running_mean" in dict(module.named_buffers(recurse=False)):
            module.eval()


def _with_rates(config: Config, learning: LearningConfig) -> Config:
    """The configuration with the learning rates of the stream, which do not change.

    Adam's is by default smaller by as much as the batches are: its steps are equally long however few rows say so.
    """
    smaller = min(1.0, learning.batch_size / config.training.batch_size)
    dense_lr = learning.dense_lr or config.training.optimizer.dense_lr * smaller
    given = {"embedding_lr": learning.embedding_lr, "dense_lr": dense_lr}
    rates = {name: rate for name, rate in given.items() if rate is not None}
    optimizer = config.training.optimizer.model_copy(update={**rates, "schedule": "constant", "warmup_steps": 0})
    return config.model_copy(update={"training": config.training.model_copy(update={"optimizer": optimizer})})


def _renamed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
