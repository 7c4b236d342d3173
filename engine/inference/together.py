"""Several requests of tensors in one pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder, Values
from engine.inference.signature import CANDIDATES, LENGTHS
from engine.item_side import ItemSide
from engine.model import RankingModel
from engine.schema import FeatureSpec
from engine.training.calibration import Calibration

_NO_IDS = np.empty(0, np.int64)
_NOTHING_GIVEN = ScoreRequest({}, {}, [])


class Scoring(Protocol):
    """What scores at one moment. What changes comes as another one; rows of tables and items alone change in place.

    model: frozen. items: vectors of the catalogue's items, None where each request makes its own. version: of model
    and calibration, goes with each answer.
    """

    @property
    def model(self) -> RankingModel: ...
    @property
    def items(self) -> ItemSide | None: ...
    @property
    def catalogue(self) -> ArrowCatalogue: ...
    @property
    def encoder(self) -> FeatureEncoder: ...
    @property
    def calibration(self) -> Mapping[str, Calibration]: ...
    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class Asked:
    """A request that can be scored: its place among all, its tensors, the catalogue rows int64 [N] of its items."""

    place: int
    tensors: Mapping[str, np.ndarray]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def from_vectors(items: ItemSide, asked: Sequence[Asked]) -> dict[str, Tensor]:
    """task -> logits float32 [sum of N]. All items are of the catalogue, and no features of them are given."""
    ids, numbers = _of_requests(items.encoder, asked)
    past = {s.name: _sequence(s.name, asked) for s in items.model.sequences}
    lengths = next((lengths for _, lengths in past.values()), np.zeros(len(asked), np.int64))
    with torch.inference_mode():
        history = {s.name: items.of_history(s, past[s.name][0]) for s in items.model.sequences}
        rows = torch.from_numpy(np.concatenate([a.rows for a in asked]))
        return items.rank(rows, ids, numbers, history, torch.from_numpy(lengths), _request_of_target(asked))


def from_ids(now: Scoring, asked: Sequence[Asked]) -> dict[str, Tensor]:
    """task -> logits float32 [sum of N], whatever the requests give."""
    ids, numbers = _of_requests(now.encoder, asked)
    ids.update((s.name, _sequence(s.name, asked)) for s in now.encoder.schema.sequences)
    for feature in now.encoder.schema.of_item():
        values, lengths = _of_items(now, feature, asked)
        if feature.is_dense:
            numbers[feature.name] = values
        else:
            ids[feature.name] = values, lengths
    with torch.inference_mode():
        batch = now.encoder.assemble(ids, numbers, len(asked), sum(map(len, asked)))
        batch.user_of_target = _request_of_target(asked)
        logits: dict[str, Tensor] = now.model(batch)
        return logits


def _of_requests(encoder: FeatureEncoder, asked: Sequence[Asked]) -> tuple[dict[str, Values], dict[str, np.ndarray]]:
    """Ids and numbers of the user's and the context's features, one row a request."""
    ids: dict[str, Values] = {}
    numbers: dict[str, np.ndarray] = {}
    for feature in encoder.schema.of_request():
        if feature.is_jagged:
            if feature.kind != "sequence":
                ids[feature.name] = _sequence(feature.name, asked)
            continue
        dtype = np.float32 if feature.is_dense else np.int64
        unknown = np.array([encoder.neutral(feature)], dtype)
        values = np.concatenate([a.tensors.get(feature.name, unknown) for a in asked])
        if feature.is_dense:
            numbers[feature.name] = values
        else:
            ids[feature.name] = values, None
    return ids, numbers


def _sequence(name: str, asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """The requests' values behind one another int64 [T], and their lengths int64 [U]."""
    parts = [a.tensors.get(name, _NO_IDS) for a in asked]
    return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)


def _of_items(now: Scoring, feature: FeatureSpec, asked: Sequence[Asked]) -> Values:
    """An item feature's values for all candidates, with lengths if it has several: given, or the catalogue's."""
    parts = [_given(feature, a) or _stored(now, feature, a) for a in asked]
    values = np.concatenate([values for values, _ in parts])
    if not feature.is_jagged:
        return values, None
    return values, np.concatenate([lengths for _, lengths in parts if lengths is not None])


def _given(feature: FeatureSpec, asked: Asked) -> Values | None:
    values = asked.tensors.get(feature.name)
    if not feature.is_jagged:
        return None if values is None else (values, None)
    lengths = asked.tensors.get(feature.name + LENGTHS)
    return None if lengths is None else (_NO_IDS if values is None else values, lengths.astype(np.int64))


def _stored(now: Scoring, feature: FeatureSpec, asked: Asked) -> Values:
    prints = asked.tensors[CANDIDATES]
    column = now.encoder.of_items(feature, _NOTHING_GIVEN, now.catalogue, asked.rows, prints)
    return column.values, None if column.offsets is None else np.diff(column.offsets)


def _request_of_target(asked: Sequence[Asked]) -> Tensor:
    """int64 [sum of N]."""
    return torch.from_numpy(np.repeat(np.arange(len(asked)), [len(a) for a in asked]))
