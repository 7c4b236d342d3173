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
from engine.components import EmbeddingMethod
from engine.config import Config
from engine.errors import CheckpointError, ConfigError, DataError
from engine.memory import keep_freed_memory
from engine.model import RankingModel
from engine.plugins import Plugins
from engine.training import checkpoint
from engine.training.distributed import World, join
from engine.training.evaluation import Predictions, better, figures, named, predict
from engine.training.step import TrainStep

if TYPE_CHECKING:
    from engine.data.prepared import Prepared

log = logging.getLogger("plexrank.training")

Progress = Callable[[str, float], None]

FREE_TO_CHANGE = {"plugins", "retrieval", "serving", "learning", "name"}
FREE_TO_CHANGE_IN_TRAINING = {
    "epochs", "threads", "eval_batch_size", "sharding", "checkpoint", "early_stopping", "calibration",
}  # fmt: skip
"""What a resumed run may have otherwise than the run that it continues."""


@dataclass
class TrainResult:
    """What a run leaves. Processes other than 0 hold a model on the meta device and no predictions.

    model: frozen, with the best epoch's weights. metrics: of the test part (of validation where there is no test part)
    before calibration, with rows_per_second (training time only), seconds, peak_rss_mb, parameters, embedding_bytes
    (weights), embedding_inference_bytes (weights and vocabularies), epochs, best_epoch, history (one mapping an epoch)
    and tasks (task -> figures). optimizer: its state with those weights, where it is kept.
    """

    model: RankingModel
    metrics: dict[str, Any]
    validation: Predictions | None = None
    test: Predictions | None = None
    optimizer: dict[str, Tensor] | None = None


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
        self.core = TrainStep(config, prepared.statistics, plugins, world, self.steps * self.training.epochs)
        self.model, self.sharded = self.core.model, self.core.sharded
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
        return self.core(batch, self.state.step, where=f" (epoch {self.state.epoch + 1})")

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
            kept = self.core.tensors() if self.training.keep_optimizer else self.core.weights()
            checkpoint.write(self.root / state.best, kept, {"step": state.step}, self.world)
        else:
            state.waited += 1
        patience = self.metric is not None and state.waited >= self.training.early_stopping.patience
        state.finished = patience or state.epoch >= self.training.epochs

    # ---------------------------------------------------------------------------------------- saving, resuming
    def save(self) -> Path:
        """Writes a checkpoint and removes those that are no longer kept."""
        folder = self.root / checkpoint.step_name(self.state.step)
        state = {**vars(self.state), "config": _fixed(self.config)}
        checkpoint.write(folder, self.core.tensors(), state, self.world)
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
        found.read_into(self.core.tensors())
        patience = self.metric is not None and self.state.waited >= self.training.early_stopping.patience
        self.state.finished = patience or self.state.epoch >= self.training.epochs
        log.info("resumed at epoch %d, step %d from %s", self.state.epoch + 1, self.state.step, found.path)
        if self.progress is not None:
            self.progress(f"resumed after {self.state.epoch} epochs and {self.state.step} steps", 1.0)

    # --------------------------------------------------------------------------------------------------- result
    def result(self) -> TrainResult:
        """Restores the best epoch, freezes the model and scores validation and test with it."""
        keep = self.training.keep_optimizer
        if self.state.best is not None:
            best = self.core.tensors() if keep else self.core.weights()
            checkpoint.open_checkpoint(self.root / self.state.best).read_into(best)
            del best
        model = self.model.freeze()
        optimizer = self.core.optimizer_state() if keep else None
        sizes = self._sizes()
        del self.sharded, self.core
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
        return TrainResult(model, metrics, scored.get("validation"), scored.get("test"), optimizer)

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
