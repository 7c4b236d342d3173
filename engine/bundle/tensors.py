"""Named tensors in a file that is memory-mapped where it is large; what is wrong with it is said by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import BundleError
from engine.resident import resident

CHUNK = 1 << 24  # elements looked at together


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device; one that shares memory with another is written once more.

    BundleError names those that are not finite, and writes nothing.
    """
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        place = plain.untyped_storage().data_ptr()
        kept[name] = plain.clone() if place in storages else plain
        storages.add(place)
    bad = [name for name, tensor in kept.items() if not finite(tensor)]
    if bad:
        raise BundleError(
            f"{path.name}: not finite: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; "
            "the training diverged (lower the learning rates, or set training.optimizer.clip_norm)"
        )
    try:
        save_file(kept, path)
    except SafetensorError as error:  # a full disk comes as one of its own
        raise BundleError(f"{path.name}: cannot be written: {error}") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; of a large one mapped (private: writing to one does not change the file)."""
    try:
        read = resident(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: tensor.clone() for name, tensor in mapped.items()} if read else mapped
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: cannot be read as safetensors: {error}") from None


def headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape) without touching the data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            raw: dict[str, Any] = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as safetensors: {error}") from None
    return {n: (str(e["dtype"]), tuple(e["shape"])) for n, e in sorted(raw.items()) if n != "__metadata__"}


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; integers always are. Looks at 16 Mi elements together."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(flat[i : i + CHUNK]).all()) for i in range(0, flat.numel(), CHUNK))


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from being the state of a model that expects `expected`, one sentence a tensor."""
    wrong = [f"tensor {name} is missing" for name in expected if name not in found]
    wrong += [f"tensor {name} is not of this model" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name)
        if have is None:
            continue
        if have.shape != want.shape:
            wrong.append(f"tensor {name} has shape {tuple(have.shape)}, the model {tuple(want.shape)}")
        elif have.dtype != want.dtype:
            wrong.append(f"tensor {name} has dtype {_short(have.dtype)}, the model {_short(want.dtype)}")
    return wrong


def assign(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Puts mapped tensors into a module that was built on `meta`, without a copy; BundleError for each that misfits."""
    wrong = misfits(module.state_dict(), state)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise BundleError(f"{what}: {'; '.join(wrong[:3])}{more}: written by another version of a plugin?")
    module.load_state_dict(dict(state), strict=True, assign=True)
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise BundleError(f"{what}: {', '.join(left[:3])} are not in the state: frozen modules keep no other buffers")
    module.requires_grad_(False)
    module.eval()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
