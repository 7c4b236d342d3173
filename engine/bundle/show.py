"""What is in a bundle, for people: from the manifest and the files' headers, without reading weights."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from engine.bundle.open import Bundle
from engine.bundle.tensors import headers


def show(path: Path) -> dict[str, Any]:
    """The figures that `plexrank bundle show` prints; BundleError for what is no bundle (contents are not hashed)."""
    bundle = Bundle.open(Path(path), verify=False)
    manifest = bundle.manifest
    return {
        "path": str(path),
        "name": manifest.name,
        "version": manifest.version,
        "parent": manifest.parent,
        "created": manifest.created,
        "seed": manifest.seed,
        "tasks": list(bundle.schema.tasks),
        "features": [
            {"name": f.name, "kind": f.kind, "side": f.side, "space": f.space, "dim": f.dim}
            for f in bundle.schema.features
        ],
        "plugins": [p.model_dump() for p in manifest.plugins],
        "libraries": manifest.libraries,
        "metrics": manifest.metrics,
        "items": len(bundle.item_counts),
        "calibration": {task: c.describe() for task, c in bundle.calibration.items()},
        "tensors": _tensors(bundle),
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def _tensors(bundle: Bundle) -> list[dict[str, Any]]:
    rows = []
    for name in ("model.safetensors", "retrieval.safetensors"):
        if name in bundle.manifest.files:
            for tensor, (dtype, shape) in headers(bundle.path / name).items():
                row = {"file": name, "name": tensor, "dtype": dtype, "shape": list(shape), "elements": prod(shape)}
                rows.append(row)
    return rows
