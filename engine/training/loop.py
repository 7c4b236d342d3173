"""The training loop: one function at any number of processes, started bare or by torchrun."""

from __future__ import annotations

import gc
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.components import EmbeddingMethod, Loss
from engine.config import Config
from engine.errors import CheckpointError, ConfigError, DataError, PlexrankError
from engine.memory import keep_freed_memory
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from engine.tables import unallocated_tables
from engine.training import checkpoint
from engine.training.distributed import World, average_gradients, join, shard
from engine.training.evaluation import Predictions, better, figures, named, predict
from engine.training.optim import Optimizers
from engine.training.regularisation import MiniBatchAwareL2

if TYPE_CHECKING:
    from engine.data.prepared import Prepared

log = logging.getLogger("plexrank.training")

Progress = Callable[[str, float], None]

FREE_TO_CHANGE = {"plugins", "retrieval", "serving", "learning", "name"}
FREE_TO_CHANGE_IN_TRAINING = {
    "epochs", "threads", "eval_batch_size", "sharding", "checkpoint", "early_stopping", "calibration",
}  # fmt: skip
"""What a resumed run may have otherwise than the run that it continues."""


class TrainingError(PlexrankError):
    """Training cannot go on: the loss is not a finite number."""


@dataclass
class TrainResult:
    """What a run leaves. Processes other than 0 hold a model on the meta device and no predictions.

    model: frozen, with the best epoch's weights. metrics: of the test part (of validation where there is no test part)
    before calibration, with rows_per_second (training time only), seconds, peak_rss_mb, parameters, embedding_bytes
    (weights), embedding_inference_bytes (weights and vocabularies), epochs, best_epoch, history (one mapping an epoch)
    and tasks (task -> figures).
    """

    model: RankingModel
    metrics: dict[str, Any]
    validation: Predictions | None = None
    test: Predictions | None = None


@dataclass
class State:
    """Where the loop stands; part of each checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rows: int = 0
    rows_total: int = 0
    seconds_training: float = 0.0
    seconds: float = 0.0
    best: str | None = None
    best_value: float | None = None
    best_epoch: int = 0
    waited: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    config: Config,
    prepared: Prepared,
    out: Path,
    *,
    plugins: Plugins,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains the configuration's model on prepared data; checkpoints lie under `out/checkpoints`.

    resume: go on from the newest whole checkpoint there, whatever the number of processes or the sharding; on one
    thread and one process the result is that of a run that was never interrupted, to the last bit. Without it the
    checkpoints of an earlier run are removed.

    Raises ConfigError, CheckpointError, or TrainingError when the loss is no finite number (it names the step).
    """
    keep_freed_memory()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    loop = Loop(config, prepared, out / "checkpoints", plugins, join(), progress)
    if resume:
        loop.resume()
    else:
        checkpoint.clear(loop.root, loop.world)
    loop.run()
    return loop.result()


class Loop:
    """One run: model, optimizers and the state between steps."""

    def __init__(
        self, config: Config, prepared: Prepared, root: Path, plugins: Plugins, world: World, progress: Progress | None
    ) -> None:
        self.config, self.training = config, config.training
        self.prepared, self.root, self.plugins, self.world = prepared, root, plugins, world
        self.progress = progress
        self.state = State()
        self.metric = self._metric()
        self.steps = prepared.steps("train", self.training.batch_size)
        if self.steps == 0:
            raise DataError("the training split is empty; see data.split")
        with unallocated_tables():
            self.model = build_model(config, prepared.statistics, plugins)
        self.sharded = shard(self.model, self.training.sharding, self.training.optimizer, world)
        self.optimizers = Optimizers(self.sharded, self.training.optimizer, self.steps * self.training.epochs)
        loss = plugins.get("losses", self.training.loss.name)
        self.loss: Loss = loss(loss.Options(**self.training.loss.options)).to(world.device)
        self.l2 = None
        if self.training.mini_batch_aware_l2 > 0:
            method = self.model.embedding
            assert isinstance(method, EmbeddingMethod)
            self.l2 = MiniBatchAwareL2(method.features, prepared.statistics, self.training.mini_batch_aware_l2, world)
        self._shown = 0.0

    def _metric(self) -> str | None:
        metric = self.training.early_stopping.metric
        if metric == "none" or not self.prepared.rows.get("validation"):
            return None
        if metric == "gauc" and self.config.data.user is None:
            raise ConfigError("training.early_stopping.metric: gauc needs users, and data.user is null")
        return metric

    # ------------------------------------------------------------------------------------------------ running
    def run(self) -> None:
        """Epochs until the last, or until the validation metric has not improved for `patience` of them."""
        while not self.state.finished:
            self._epoch()

    def _epoch(self) -> None:
        state = self.state
        started = time.perf_counter()
        self.sharded.train()
        batches = self.prepared.batches(
            "train",
            self.training.batch_size,
            shuffle_seed=(self.config.seed * 1_000_003 + state.epoch) % (1 << 31),
            rank=self.world.rank,
            world=self.world.size,
            start_step=state.step_in_epoch,
        )
        every = self.training.checkpoint.every_steps
        for batch in batches:
            loss, rows = self.step(batch)
            state.loss_sum += loss * rows
            state.rows += rows
            state.rows_total += rows
            state.step += 1
            state.step_in_epoch += 1
            self._show(loss)
            if every and state.step % every == 0 and state.step_in_epoch < self.steps:
                started = self._pause(started)
                self.save()
                started = time.perf_counter()
        self._pause(started)
        self._close_epoch()

    def _pause(self, started: float) -> float:
        """Ends a stretch of pure training time."""
        now = time.perf_counter()
        self.state.seconds_training += now - started
        self.state.seconds += now - started
        return now

    def step(self, batch: Batch) -> tuple[float, int]:
        """One optimizer step. -> the mean loss of the batch over all processes, and its rows."""
        if self.world.device.type != "cpu":
            batch = batch.to(self.world.device, non_blocking=True)
        self.optimizers.begin(self.state.step)
        reseed(self._step_seed(), self.world.device)
        rows, share = self._share(batch)
        embedded = self.model.embed(batch)
        logits = self.model.score(batch, embedded)
        loss = self._mean_loss(logits, batch) * share
        whole = loss if self.l2 is None else loss + self.world.size * self.l2.penalty(batch.ids, embedded)
        whole.backward()
        mean = float(average_gradients(self.optimizers.parameters, loss.detach(), self.world))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {self.state.step + 1} (epoch {self.state.epoch + 1}): lower "
                "training.optimizer.embedding_lr and dense_lr, set clip_norm, or look for huge values in the numeric "
                "features with `plexrank validate --data`"
            )
        self.optimizers.step()
        if self.plugins.listens("on_train_step"):
            self.plugins.notify("on_train_step", step=self.state.step + 1, metrics={"loss": mean})
        return mean, rows

    def _step_seed(self) -> int:
        """Dropout's random numbers follow from the step, so a resumed run draws the same, at any step."""
        return (self.config.seed * 0x9E3779B97F4A7C15 + self.state.step * 0x10001 + self.world.rank) % (1 << 63)

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

    def _mean_loss(self, logits: dict[str, Tensor], batch: Batch) -> Tensor:
        """The sum of the tasks' mean losses over this process's rows."""
        losses = [self.loss(logits[task], batch.labels[task], batch.weight) for task in self.model.schema.tasks]
        return torch.stack(losses).sum()

    def _show(self, loss: float) -> None:
        now = time.perf_counter()
        if self.progress is None or now - self._shown < 0.1:
            return
        self._shown = now
        done, whole = self.state.step, self.steps * self.training.epochs
        stage = f"training; epoch {self.state.epoch + 1}/{self.training.epochs}, loss {loss:.4f}"
        self.progress(stage, min(1.0, done / whole))

    # ------------------------------------------------------------------------------------- the end of an epoch
    def _close_epoch(self) -> None:
        state = self.state
        started = time.perf_counter()
        entry: dict[str, Any] = {"epoch": state.epoch + 1, "loss": state.loss_sum / max(1, state.rows)}
        entry["rows_per_second"] = state.rows_total / max(state.seconds_training, 1e-9)
        if self.prepared.rows.get("validation"):
            entry.update(figures(self._validate(), self.model.schema.tasks[0]))
        state.history.append(entry)
        log.info("epoch %d: %s", state.epoch + 1, named({k: v for k, v in entry.items() if k != "epoch"}))
        state.epoch += 1
        state.step_in_epoch, state.loss_sum, state.rows = 0, 0.0, 0
        self._judge(entry)
        state.seconds += time.perf_counter() - started
        entry["seconds"] = state.seconds
        self.save()

    def _validate(self) -> Predictions:
        batches = self.prepared.batches(
            "validation", self.training.eval_batch_size, rank=self.world.rank, world=self.world.size
        )
        return predict(self.sharded, batches, self.world)

    def _judge(self, entry: dict[str, Any]) -> None:
        """Keeps the weights of a best epoch, and ends the run after the last one or when patience is over."""
        state = self.state
        value = entry.get(self.metric) if self.metric else None
        if value is not None and (state.best_value is None or better(self.metric or "", value, state.best_value)):
            state.best, state.best_value, state.best_epoch = checkpoint.best_name(state.step), value, state.epoch
            state.waited = 0
            checkpoint.write(self.root / state.best, self._weights(), {"step": state.step}, self.world)
        else:
            state.waited += 1
        patience = self.metric is not None and state.waited >= self.training.early_stopping.patience
        state.finished = patience or state.epoch >= self.training.epochs

    # ---------------------------------------------------------------------------------------- saving, resuming
    def _weights(self) -> dict[str, Any]:
        return {f"model/{name}": value for name, value in self.model.state_dict().items()}

    def _tensors(self) -> dict[str, Any]:
        return {
            **self._weights(),
            **{f"tables/{name}": value for name, value in self.optimizers.table_state()},
            **{f"dense/{name}": value for name, value in self.optimizers.dense_state().items()},
        }

    def save(self) -> Path:
        """Writes a checkpoint and removes those that are no longer kept."""
        folder = self.root / checkpoint.step_name(self.state.step)
        state = {**vars(self.state), "config": _fixed(self.config)}
        checkpoint.write(folder, self._tensors(), state, self.world)
        checkpoint.prune(self.root, self.training.checkpoint.keep, self.state.best, self.world)
        if self.world.rank == 0 and self.plugins.listens("on_checkpoint"):
            self.plugins.notify("on_checkpoint", path=folder, step=self.state.step)
        return folder

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        found = checkpoint.latest(self.root, self.world)
        if found is None:
            log.warning("no checkpoint under %s: starting anew", self.root)
            return
        kept = dict(found.state)
        _same(kept.pop("config"), _fixed(self.config), found.path)
        self.state = State(**kept)
        found.read_into(self._tensors())
        patience = self.metric is not None and self.state.waited >= self.training.early_stopping.patience
        self.state.finished = patience or self.state.epoch >= self.training.epochs
        log.info("resumed at epoch %d, step %d from %s", self.state.epoch + 1, self.state.step, found.path)
        if self.progress is not None:
            self.progress(f"resumed after {self.state.epoch} epochs and {self.state.step} steps", 1.0)

    # --------------------------------------------------------------------------------------------------- result
    def result(self) -> TrainResult:
        """Restores the best epoch, freezes the model and scores validation and test with it."""
        if self.state.best is not None:
            checkpoint.open_checkpoint(self.root / self.state.best).read_into(self._weights())
        model = self.model.freeze()
        sizes = self._sizes()
        del self.sharded, self.optimizers
        gc.collect()
        scored: dict[str, Predictions] = {}
        if self.world.rank == 0:
            for split in ("validation", "test"):
                if self.prepared.rows.get(split):
                    scored[split] = predict(model, self.prepared.batches(split, self.training.eval_batch_size))
        measured = {task: self._figures(scored, task) for task in model.schema.tasks}
        state = self.state
        metrics = {
            **measured[model.schema.tasks[0]],
            "rows_per_second": state.rows_total / max(state.seconds_training, 1e-9),
            "seconds": state.seconds,
            "peak_rss_mb": peak_rss_mb(),
            **sizes,
            "epochs": state.epoch,
            "best_epoch": state.best_epoch or state.epoch,
            "history": state.history,
            "tasks": measured,
        }
        return TrainResult(model, metrics, scored.get("validation"), scored.get("test"))

    def _figures(self, scored: dict[str, Predictions], task: str) -> dict[str, float | None]:
        part = scored.get("test", scored.get("validation"))
        return figures(part, task) if part is not None else {}

    def _sizes(self) -> dict[str, int]:
        everything = {n: math.prod(v.size()) for n, v in self.model.state_dict().items()}
        method = self.model.embedding
        assert isinstance(method, EmbeddingMethod)
        embedding = sum(n for name, n in everything.items() if name.startswith("embedding."))
        return {
            "parameters": sum(everything.values()),
            "embedding_bytes": 4 * embedding,
            "embedding_inference_bytes": method.memory_bytes().inference,
        }


def reseed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the devices in use only: that asks every kind of device, at a cost each step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def _fixed(config: Config) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    kept = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    kept["training"] = {k: v for k, v in kept["training"].items() if k not in FREE_TO_CHANGE_IN_TRAINING}
    return kept


def _same(old: Any, new: Any, path: Path) -> None:
    for where, before, after in _differences(old, new, ""):
        raise CheckpointError(
            f"{path}: the run had {where} = {before!r}, the configuration now has {after!r}; put it back, or start "
            "anew without --resume"
        )


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new
