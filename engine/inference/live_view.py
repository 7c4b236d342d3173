"""What scores from live memory at one moment: a model over mapped tables, items' vectors, calibration, version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.tensors import assign
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.errors import BundleError
from engine.inference.live_files import DensePart, Generation
from engine.inference.quantised import QuantisedTables
from engine.item_side import ItemSide
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from engine.streaming.deltas.apply import TABLES
from engine.tables import FrozenTables
from engine.training.calibration import Calibration

_PROBED = 50
"""Items that a trial scores."""


@dataclass(frozen=True)
class LiveView:
    """Replaced as one. Rows of tables and of items change under it; the rest never does.

    version: of the dense part, and of the newest delta all of whose rows are in. It is an
    `engine.inference.together.Scoring`.
    """

    model: RankingModel
    items: ItemSide | None
    calibration: Mapping[str, Calibration]
    version: str
    encoder: FeatureEncoder
    catalogue: ArrowCatalogue


def built(bundle: Bundle, plugins: Plugins, tables: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> RankingModel:
    """The bundle's model, settled, over these tables (float32, or all quantised) and with this state behind them;
    neither is copied.

    BundleError where they are not of this model.
    """
    model = build_model(bundle.config, bundle.statistics, plugins, frozen=True, device=torch.device("meta"))
    if isinstance(model.embedding, FrozenTables) and all(t.dtype == torch.uint8 for t in tables.values()):
        model.embedding = QuantisedTables.like(model.embedding)
    assign(model, {**{f"{TABLES}{name}": table for name, table in tables.items()}, **state}, str(bundle.path))
    model.settle()
    return model


def side_of(bundle: Bundle, model: RankingModel, generation: Generation, most_bytes: int) -> ItemSide | None:
    """Over the generation's vectors, where it keeps them. BundleError where they are not of this catalogue."""
    held = generation.items
    if held is None:
        return None
    if len(held.vectors) != len(bundle.catalogue):
        raise BundleError(
            f"{generation.path}: vectors of {len(held.vectors):,} items; the catalogue of {bundle.path} has "
            f"{len(bundle.catalogue):,}: remove the folder and begin again"
        )
    return ItemSide(model, bundle.encoder, bundle.catalogue, most_bytes, held)


def first_view(
    bundle: Bundle, plugins: Plugins, generation: Generation, dense: DensePart, version: str, most_bytes: int
) -> LiveView:
    """Of a generation. BundleError where it does not fit the bundle."""
    missing = [task for task in bundle.schema.tasks if task not in dense.calibration]
    if missing:
        raise BundleError(f"{generation.path}: no calibration of task {missing[0]}: remove the folder and begin again")
    return view_of(
        bundle, built(bundle, plugins, generation.tables, dense.state), generation, dense, version, most_bytes
    )


def view_of(
    bundle: Bundle, model: RankingModel, generation: Generation, dense: DensePart, version: str, most_bytes: int
) -> LiveView:
    """Of a model that was built over the generation's tables."""
    items = side_of(bundle, model, generation, most_bytes)
    return LiveView(model, items, dense.calibration, version, bundle.encoder, bundle.catalogue)


def check(view: LiveView, what: str) -> None:
    """Scores some items. BundleError where a score is missing or not finite."""
    known = view.catalogue.ids(np.arange(min(_PROBED, len(view.catalogue)))) or ["item"]
    item = view.encoder.schema.item
    request = ScoreRequest(user={}, history={item: known} if item else {}, items=known)
    try:
        with torch.inference_mode():
            logits = view.items.logits(request) if view.items is not None else None
            if logits is None:
                logits = view.model(view.encoder.encode_request(request, view.catalogue))
        for task in view.encoder.schema.tasks:
            scores = view.calibration[task].apply(logits[task].numpy())
            if scores.shape != (len(known),) or not np.isfinite(scores).all():
                raise BundleError(f"task {task}: not one finite score an item")
    except Exception as error:
        raise BundleError(f"{what}: the trial call failed: {type(error).__name__}: {error}") from error
