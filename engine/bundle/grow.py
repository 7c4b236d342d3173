"""A bundle that grew from another: new weights and items, the rest as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.bundle.open import OPTIMIZER, Bundle
from engine.bundle.tensors import load_tensors, save_tensors
from engine.bundle.write import assemble
from engine.files import link
from engine.retrieval import item_batch

if TYPE_CHECKING:
    from engine.catalogue import ArrowCatalogue
    from engine.model import RankingModel
    from engine.plugins import Plugins
    from engine.retrieval import EncoderModel
    from engine.training.calibration import Calibration

MODEL, VECTORS, ENCODER = "model.safetensors", "vectors.safetensors", "retrieval.safetensors"
CALIBRATION = "calibration.safetensors"
_ITEMS = 8192


def write_grown(
    path: Path,
    base: Bundle,
    *,
    model: RankingModel,
    optimizer: Mapping[str, Tensor],
    catalogue: ArrowCatalogue,
    metrics: Mapping[str, Any],
    calibration: Mapping[str, Calibration] | None = None,
    encoder: EncoderModel | None = None,
    plugins: Plugins,
    replace: bool = False,
    prove: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Writes a bundle whose parent is `base`; what did not change is linked (or copied) from there.

    model, encoder: frozen. encoder, calibration: None where the base's stay. catalogue: the base's, or what became of
    it: its first rows are the base's. metrics: are put over the base's. path, replace, prove and errors as for
    `write_bundle`.
    """

    def parts(folder: Path) -> None:
        grown = len(catalogue) - len(base.item_counts)
        left_out = {MODEL, OPTIMIZER}
        save_tensors(folder / MODEL, model.state_dict())
        save_tensors(folder / OPTIMIZER, optimizer)
        if calibration is not None:
            left_out.add(CALIBRATION)
            named = {
                name: value for task, its in calibration.items() for name, value in its.to_tensors(f"{task}.").items()
            }
            save_tensors(folder / CALIBRATION, named)
        (folder / "catalogue").mkdir()
        if catalogue is not base.catalogue:
            left_out |= {n for n in base.manifest.files if n.startswith("catalogue/")}
            catalogue.save(folder / "catalogue")
        if grown:
            left_out.add("statistics.safetensors")
            save_tensors(folder / "statistics.safetensors", _longer(base.path / "statistics.safetensors", grown))
        if base.item_vectors is not None and (encoder is not None or catalogue is not base.catalogue):
            left_out |= {VECTORS} if encoder is None else {VECTORS, ENCODER}
            if encoder is not None:
                save_tensors(folder / ENCODER, encoder.state_dict())
            used = encoder if encoder is not None else base.encoder_model(plugins)
            assert used is not None
            save_tensors(folder / VECTORS, {"vectors": _vectors(used, base, catalogue)})
        for name in base.manifest.files.keys() - left_out:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link(base.path / name, folder / name)

    return assemble(
        path,
        parts,
        config=base.config,
        metrics={**base.manifest.metrics, **metrics},
        parent=base.version,
        replace=replace,
        prove=prove,
        plugins=plugins,
    )


def _longer(path: Path, rows: int) -> dict[str, Tensor]:
    """The statistics, with items behind the last of which nothing was counted."""
    tensors = load_tensors(path)
    for name in ("item_counts", "item_latest"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(rows, dtype=torch.int64)])
    return tensors


@torch.inference_mode()
def _vectors(encoder: EncoderModel, base: Bundle, catalogue: ArrowCatalogue) -> Tensor:
    """Of all items, by catalogue row."""
    rows = np.arange(len(catalogue))
    parts = [
        encoder.items(item_batch(base.encoder, catalogue, rows[start : start + _ITEMS])).cpu()
        for start in range(0, len(rows), _ITEMS)
    ]
    return torch.cat(parts)
