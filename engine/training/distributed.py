"""Processes and sharding: one code path for one process and for many (torchrun), on CPU (gloo) and GPU (nccl)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  its operators must be there before torchrec asks for them
import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import BoundsCheckMode, ShardingEnv, ShardingType

from engine.config import OptimizerConfig, ShardingConfig
from engine.errors import ConfigError
from engine.tables import TableEmbedding

ALLOWED = {
    "table_wise": [ShardingType.TABLE_WISE.value],
    "row_wise": [ShardingType.ROW_WISE.value],
    "planner": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
}
"""Column-wise is left out: row-wise Adagrad would keep one state a column shard, so worlds would differ."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device


def join() -> World:
    """Joins torchrun's process group, or makes one of this process alone. A second call is free."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device)


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder; it offers row-wise on GPU only, but gloo can do it as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ALLOWED["planner"]


def shard(
    model: nn.Module, sharding: ShardingConfig, optimizer: OptimizerConfig, world: World
) -> DistributedModelParallel:
    """Spreads the tables of a model made under `unallocated_tables` and fills them with their first weights.

    The model is changed in place. Tables take fused row-wise Adagrad, which updates them inside `backward`; dense
    parameters stay whole on each process, and `average_gradients` keeps them equal.
    """
    methods = [m for m in model.modules() if isinstance(m, TableEmbedding)]
    sharder = Sharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": optimizer.embedding_lr,
            "eps": optimizer.embedding_eps,
            "bounds_check_mode": BoundsCheckMode.FATAL,
        }
    )
    kind = world.device.type
    topology = Topology(
        world_size=world.size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
        compute_device=kind,
        hbm_cap=torch.cuda.get_device_properties(world.device).total_memory if kind == "cuda" else None,
        ddr_cap=psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
    )
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=ALLOWED["table_wise" if leaves_some_without(table.rows, world.size) else sharding.type],
            compute_kernels=["fused"],
        )
        for method in methods
        for table in method.tables.values()
    }
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    try:
        plan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    except PlannerError as error:
        raise ConfigError(
            f"training.sharding: the tables do not fit {world.size} process(es) {sharding.type}: {error}; "
            "choose row_wise, start more processes, or make the tables smaller"
        ) from error
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=world.device,
        plan=plan,
        sharders=[sharder],
        init_data_parallel=False,
    )
    model.to(world.device)
    for method in methods:
        method.initialise()
    return sharded


def leaves_some_without(rows: int, processes: int) -> bool:
    """Whether row-wise blocks of equal size leave a process without a row, which fbgemm refuses."""
    block = -(-rows // processes)
    return block * (processes - 1) >= rows


def average_gradients(parameters: Sequence[nn.Parameter], extra: Tensor, world: World) -> Tensor:
    """Replaces dense gradients by their mean over all processes, in one message.

    extra: a scalar that is averaged along (the loss). -> its mean. A parameter without gradient counts as zero.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world.size == 1:
        return extra
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients] + [extra.reshape(1)])
    dist.all_reduce(flat)
    flat /= world.size
    parts = flat.split([*(g.numel() for g in gradients), 1])
    for gradient, part in zip(gradients, parts[:-1], strict=True):
        gradient.copy_(part.view_as(gradient))
    return parts[-1][0]


def total(value: float, world: World) -> float:
    """The sum of a number over all processes."""
    if world.size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return float(tensor)


def gather_all(values: Tensor, world: World) -> Tensor:
    """Concatenates [n_r, ...] of all processes, whose n_r may differ, in the order of the processes."""
    if world.size == 1:
        return values
    count = torch.tensor([len(values)], device=world.device)
    counts = [torch.empty_like(count) for _ in range(world.size)]
    dist.all_gather(counts, count)
    most = max(int(c) for c in counts)
    padded = torch.zeros(most, *values.shape[1:], dtype=values.dtype, device=world.device)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(c)] for p, c in zip(parts, counts, strict=True)])


def barrier(world: World) -> None:
    """Waits for all processes."""
    if world.size > 1:
        dist.barrier()
