"""Training checkpoints: whole or skipped, without pickle, readable at any number of processes and any sharding.

A checkpoint is a folder `step-<number>`: a safetensors file a process with the rows that it holds, and `index.json`,
which says for each tensor which file holds which of its rows, the sha256 of each file, and the state of the loop. It is
written under another name, synced and renamed, so a folder of the final name is whole unless the disk damaged it later.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from engine.errors import CheckpointError
from engine.files import sha256, sync
from engine.training.distributed import World, barrier

log = logging.getLogger("plexrank.training")

FORMAT = 1
INDEX = "index.json"


def write(folder: Path, tensors: Mapping[str, Tensor | ShardedTensor], state: Mapping[str, Any], world: World) -> None:
    """Writes one checkpoint; all processes call this with the same names.

    tensors: sharded ones are written by their owners, plain ones by process 0. state: JSON, kept by process 0.
    """
    pending = folder.with_name(f".{folder.name}.pending")
    if world.rank == 0:
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
    barrier(world)
    name = f"process-{world.rank:05d}-of-{world.size:05d}"
    local, parts = {}, []
    for key, value in tensors.items():
        for tensor, offset in _pieces(value, world):
            label = f"{key}@{offset}"
            local[label] = tensor.detach().cpu().contiguous()
            parts.append(
                {"tensor": key, "key": label, "offset": offset, "rows": tensor.shape[0] if tensor.dim() else 1}
            )
    file = pending / f"{name}.safetensors"
    save_file(local, file)
    _write_json(
        pending / f"{name}.json",
        {"file": file.name, "sha256": sha256(file), "bytes": file.stat().st_size, "parts": parts},
    )
    sync(file)
    barrier(world)
    if world.rank == 0:
        members = [json.loads(p.read_text()) for p in sorted(pending.glob("process-*.json"))]
        _write_json(pending / INDEX, {"format": FORMAT, "state": dict(state), "members": members})
        for part in pending.glob("process-*.json"):
            part.unlink()
        sync(pending)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(pending, folder)
        sync(folder.parent)
    barrier(world)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    index: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        return self.index["state"]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def read_into(self, tensors: Mapping[str, Tensor | ShardedTensor]) -> None:
        """Fills tensors, or this process's rows of them, whatever the layout they were written from."""
        parts: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for member in self.index["members"]:
            for part in member["parts"]:
                parts.setdefault(part["tensor"], []).append((member["file"], part))
        files = {m["file"]: safe_open(self.path / m["file"], "pt") for m in self.index["members"]}
        for name, value in tensors.items():
            if name not in parts:
                raise CheckpointError(f"{self.path}: no tensor '{name}'; it is of another model")
            for target, first in _targets(value):
                self._fill(name, target, first, parts[name], files)

    def _fill(
        self, name: str, target: Tensor, first: int, parts: list[tuple[str, dict[str, Any]]], files: dict[str, Any]
    ) -> None:
        if target.dim() == 0:
            target.copy_(files[parts[0][0]].get_tensor(parts[0][1]["key"]))
            return
        last, filled = first + target.shape[0], 0
        for file, part in parts:
            low, high = max(first, part["offset"]), min(last, part["offset"] + part["rows"])
            if low >= high:
                continue
            rows = files[file].get_slice(part["key"])[low - part["offset"] : high - part["offset"]]
            if rows.shape[1:] != target.shape[1:]:
                raise CheckpointError(
                    f"{self.path}: '{name}' has rows of {list(rows.shape[1:])}, not {list(target.shape[1:])}"
                )
            target[low - first : high - first] = rows.to(target.device, target.dtype)
            filled += high - low
        if filled != target.shape[0]:
            raise CheckpointError(f"{self.path}: '{name}' has {filled} of the {target.shape[0]} rows wanted")


def open_checkpoint(path: Path) -> Checkpoint:
    """Verifies a checkpoint's files against its index. CheckpointError names what is wrong."""
    try:
        index = json.loads((path / INDEX).read_text())
        if index["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {index['format']}, this version reads {FORMAT}")
        for member in index["members"]:
            file = path / member["file"]
            if not file.is_file():
                raise CheckpointError(f"{path}: {member['file']} is missing")
            if file.stat().st_size != member["bytes"] or sha256(file) != member["sha256"]:
                raise CheckpointError(f"{path}: {member['file']} is damaged (its checksum differs)")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {INDEX} cannot be read: {error}") from error
    return Checkpoint(path, index)


def latest(root: Path, world: World) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all processes; None if there are none.

    A damaged one is named in the log and skipped for the one before it. If none is whole: CheckpointError.
    """
    chosen = _newest_whole(root) if world.rank == 0 else 0
    if world.size > 1:
        shared = torch.tensor([chosen], device=world.device)
        dist.broadcast(shared, 0)
        chosen = int(shared)
    if chosen == _DAMAGED:
        raise CheckpointError(f"{root}: no checkpoint is whole; start anew without --resume")
    if chosen < 0:
        return None
    path = root / step_name(chosen)
    return Checkpoint(path, json.loads((path / INDEX).read_text()))


_NONE, _DAMAGED = -1, -2


def _newest_whole(root: Path) -> int:
    there = sorted(steps(root), reverse=True)
    for step in there:
        try:
            found = open_checkpoint(root / step_name(step))
            if found.state.get("best"):
                open_checkpoint(root / found.state["best"])
            return step
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
    return _DAMAGED if there else _NONE


def clear(root: Path, world: World) -> None:
    """Removes the checkpoints of an earlier run."""
    if world.rank == 0:
        for pattern in ("step-*", "best-*", ".*.pending"):
            for folder in root.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)
    barrier(world)


def prune(root: Path, keep: int, best: str | None, world: World) -> None:
    """Removes all but the newest `keep` checkpoints, and best weights that none of them names."""
    if world.rank != 0:
        return
    kept = sorted(steps(root), reverse=True)
    for step in kept[keep:]:
        shutil.rmtree(root / step_name(step), ignore_errors=True)
    named = {best}
    for step in kept[:keep]:
        try:
            named.add(json.loads((root / step_name(step) / INDEX).read_text())["state"].get("best"))
        except (OSError, ValueError, KeyError):
            continue
    for folder in root.glob("best-*"):
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def best_name(step: int) -> str:
    return f"best-{step:09d}"


def steps(root: Path) -> list[int]:
    """The numbers of the checkpoints in a folder, whole or not."""
    return [int(p.name.split("-")[1]) for p in root.glob("step-*") if p.is_dir() and p.name.split("-")[1].isdigit()]


def _pieces(value: Tensor | ShardedTensor, world: World) -> Iterator[tuple[Tensor, int]]:
    """(rows that this process writes, number of the first)."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.tensor, shard.metadata.shard_offsets[0]
    elif world.rank == 0:
        yield value, 0


def _targets(value: Tensor | ShardedTensor) -> Iterator[tuple[Tensor, int]]:
    """(rows that this process needs, number of the first)."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.tensor, shard.metadata.shard_offsets[0]
    else:
        yield value, 0


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
