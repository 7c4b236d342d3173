"""Rankings to ids and numbers, many at once: what the model read when it scored them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.data.encoding import Encoded, ranges
from engine.events import RankingData
from engine.hashing import fingerprints
from engine.schema import FeatureSpec


@dataclass(frozen=True)
class ServedFeatures:
    """r rankings with n items, ranking by ranking.

    of_request: feature -> r encoded rows, sequences among them; of_items: feature -> n. user int64 [r], item int64 [n]:
    fingerprints. sizes int64 [r]: items of each.
    """

    of_request: dict[str, Encoded]
    of_items: dict[str, Encoded]
    user: np.ndarray
    item: np.ndarray
    sizes: np.ndarray


def encode_served(
    encoder: FeatureEncoder, catalogue: ArrowCatalogue, rankings: Sequence[RankingData]
) -> ServedFeatures:
    """The same values as `FeatureEncoder.encode_request` gives for each ranking. SchemaError where one cannot be read.

    A ranking without `user_features` is of another server: then only the user's id is known.
    """
    schema = encoder.schema
    of_request = {
        feature.name: encoder.encode_values(feature.name, _of_user(rankings, feature, schema.user))
        for feature in schema.of_request()
        if feature.kind != "sequence"
    }
    of_request |= _sequences(encoder, catalogue, rankings)
    sizes = np.fromiter((len(data.items) for data in rankings), np.int64, len(rankings))
    item = fingerprints([item.id for data in rankings for item in data.items])
    rows = catalogue.rows_of(item)
    request = ScoreRequest({}, {}, [], item_features=_overrides(rankings))
    of_items = {
        feature.name: encoder.of_items(feature, request, catalogue, rows, item)
        for feature in schema.of_item()
        if feature.kind != "sequence"
    }
    return ServedFeatures(of_request, of_items, fingerprints([data.user for data in rankings]), item, sizes)


def _of_user(rankings: Sequence[RankingData], feature: FeatureSpec, user: str | None) -> list[Any]:
    name, names_user = feature.name, feature.column == user
    values = []
    for data in rankings:
        other = None if data.context is None else data.context.get(name)
        if data.user_features is not None:
            values.append(data.user_features.get(name, other))
        else:
            values.append(data.user if names_user else other)
    return values


def _sequences(
    encoder: FeatureEncoder, catalogue: ArrowCatalogue, rankings: Sequence[RankingData]
) -> dict[str, Encoded]:
    """Each sequence's values, newest first and capped."""
    sequences = encoder.schema.sequences
    if not sequences:
        return {}
    longest = max(s.max_length for s in sequences)
    pasts = [() if data.history is None else data.history[:longest] for data in rankings]
    lengths = np.fromiter(map(len, pasts), np.int64, len(pasts))
    past = fingerprints([item for items in pasts for item in items])
    begin = np.cumsum(lengths) - lengths
    rows: np.ndarray | None = None
    out = {}
    for sequence in sequences:
        kept = np.zeros_like(lengths)
        values = past
        if encoder.schema.item and sequence.of:
            known = catalogue.encoded.get(sequence.of)
            if encoder.names_item(encoder.schema[sequence.of]):
                kept = np.minimum(lengths, sequence.max_length)
            elif known is not None:
                rows = catalogue.rows_of(past) if rows is None else rows
                kept, values = np.minimum(lengths, sequence.max_length), known.take(rows)[0]
        out[sequence.name] = Encoded(values[ranges(begin, kept)], np.concatenate([[0], np.cumsum(kept)]))
    return out


def _overrides(rankings: Sequence[RankingData]) -> dict[str, list[Any]]:
    """feature -> a value for every item, None where the catalogue's counts."""
    names = {name for data in rankings if data.item_features for name in data.item_features}
    columns: dict[str, list[Any]] = {name: [] for name in sorted(names)}
    for name, column in columns.items():
        for data in rankings:
            column += (data.item_features or {}).get(name) or [None] * len(data.items)
    return columns
