"""What differs between two bundles: configuration, plugins, figures, files and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bundle.open import OPTIMIZER, Bundle
from engine.bundle.tensors import CHUNK, load_tensors


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Only what differs, as `key -> [value of a, value of b]` (None: absent there); `same` if the versions are equal.

    `tensors`: of those in both models (and in the optimizers' states), the largest absolute difference; of the others,
    their shapes. BundleError for what is no bundle.
    """
    first, second = Bundle.open(Path(a), verify=False), Bundle.open(Path(b), verify=False)
    one, two = first.manifest, second.manifest
    return {
        "a": {"path": str(a), "name": one.name, "version": one.version, "created": one.created},
        "b": {"path": str(b), "name": two.name, "version": two.version, "created": two.created},
        "same": one.version == two.version,
        "config": _changes(flat(one.config), flat(two.config)),
        "features": _changes(_features(first), _features(second)),
        "plugins": _changes(_plugins(first), _plugins(second)),
        "libraries": _changes(one.libraries, two.libraries),
        "metrics": _changes(flat(one.metrics), flat(two.metrics)),
        "files": _changes(_sizes(first), _sizes(second)),
        "tensors": _tensors(first, second),
    }


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys: `training.epochs`, `features.3.name`."""
    if isinstance(value, Mapping) and value:
        pairs = value.items()
    elif isinstance(value, list) and value:
        pairs = dict(enumerate(value)).items()
    else:
        return {prefix: value} if prefix else {}
    return {k: v for name, inner in pairs for k, v in flat(inner, f"{prefix}.{name}" if prefix else f"{name}").items()}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _features(bundle: Bundle) -> dict[str, Any]:
    return {f.name: f.model_dump(mode="json", exclude={"name"}) for f in bundle.schema.features}


def _plugins(bundle: Bundle) -> dict[str, Any]:
    return {f"{p.kind}.{p.name}": f"{p.distribution} {p.version}" for p in bundle.manifest.plugins}


def _sizes(bundle: Bundle) -> dict[str, Any]:
    return {name: f"{e.bytes} bytes, sha256 {e.sha256[:12]}" for name, e in bundle.manifest.files.items()}


def _tensors(first: Bundle, second: Bundle) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for file in ("model.safetensors", "retrieval.safetensors", OPTIMIZER):
        both = [b.manifest.files.get(file) for b in (first, second)]
        if both[0] == both[1]:
            continue
        a, b = (load_tensors(x.path / file) if file in x.manifest.files else {} for x in (first, second))
        for name in sorted(a.keys() | b.keys()):
            x, y = a.get(name), b.get(name)
            if x is not None and y is not None and x.shape == y.shape:
                if (gap := _gap(x, y)) > 0:
                    result[f"{file}:{name}"] = {"max_abs": gap}
            else:
                result[f"{file}:{name}"] = {"shapes": [None if t is None else list(t.shape) for t in (x, y)]}
    return result


def _gap(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference, 16 Mi elements together."""
    x, y = x.reshape(-1), y.reshape(-1)
    gaps = [(x[i : i + CHUNK].double() - y[i : i + CHUNK].double()).abs().max() for i in range(0, len(x), CHUNK)]
    return float(torch.stack(gaps).max()) if gaps else 0.0
