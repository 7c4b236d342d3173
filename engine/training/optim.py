"""The two optimizers of a model, their learning rates and the clipping of the dense gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from engine.config import OptimizerConfig


def schedule(config: OptimizerConfig, step: int, steps: int) -> float:
    """The factor of both learning rates at `step` (0: first) of `steps`: a rise, then the named course."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    share = min(1.0, share)
    return 1.0 - share if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))


class Optimizers:
    """Row-wise Adagrad inside the tables' backward, Adam (decoupled weight decay) for everything else."""

    def __init__(self, model: DistributedModelParallel, config: OptimizerConfig, steps: int) -> None:
        self.config = config
        self.steps = steps
        self.tables: list[KeyedOptimizer] = [optimizer for _, optimizer in model.fused_optimizer.optimizers]
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        for name, parameter in in_backward_optimizer_filter(model.module.named_parameters()):
            if parameter.requires_grad:
                self.names.append(name)
                self.parameters.append(parameter)
        self.dense = (
            torch.optim.AdamW(self.parameters, lr=config.dense_lr, weight_decay=config.dense_weight_decay, fused=True)
            if self.parameters
            else None
        )

    def begin(self, step: int) -> float:
        """Sets this step's learning rates, before the forward pass. -> the schedule's factor."""
        factor = schedule(self.config, step, self.steps)
        for optimizer in self.tables:
            for group in optimizer.param_groups:
                group["lr"] = self.config.embedding_lr * factor
            optimizer.zero_grad()  # hands the rate to the kernels; the update happens in backward
        for parameter in self.parameters:
            parameter.grad = None
        if self.dense is not None:
            for group in self.dense.param_groups:
                group["lr"] = self.config.dense_lr * factor
        return factor

    def step(self) -> None:
        """Clips the dense gradient and updates the dense parameters."""
        if self.dense is None:
            return
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.dense.step()

    def table_state(self) -> Iterator[tuple[str, Any]]:
        """(name, sharded tensor) of each table's accumulated squares."""
        for optimizer in self.tables:
            for parameter, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    yield f"{parameter}/{key.split('.')[-1]}", value

    def dense_state(self) -> dict[str, Tensor]:
        """Adam's moments and step by parameter; made (zeros) where no step was taken yet."""
        if self.dense is None:
            return {}
        found = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = self.dense.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            found.update({f"{name}/{key}": value for key, value in state.items()})
        return found
