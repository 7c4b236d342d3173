"""A model with a feature of every kind, a catalogue of four items, and rankings over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.data.encoding import encode_raw
from engine.data.numeric import NumericTransforms
from engine.events import RankedItem, RankingData
from engine.hashing import fingerprints
from engine.schema import FeatureSpec, Schema
from engine.streaming.events.decode import Rankings

SCHEMA = Schema(
    features=(
        FeatureSpec(name="who", side="user", column="user"),
        FeatureSpec(name="job", side="user"),
        FeatureSpec(name="likes", side="user", kind="multi", max_length=3),
        FeatureSpec(name="age", side="user", kind="numeric", transform="bins", bins=4),
        FeatureSpec(name="visits", side="user", kind="numeric", transform="log"),
        FeatureSpec(name="hour", side="context"),
        FeatureSpec(name="delay", side="context", kind="numeric"),
        FeatureSpec(name="item"),
        FeatureSpec(name="brand"),
        FeatureSpec(name="tags", kind="multi", max_length=3),
        FeatureSpec(name="price", kind="numeric"),
        FeatureSpec(name="stars", kind="numeric", transform="bins", bins=4),
        FeatureSpec(name="mood"),  # not in the catalogue
        FeatureSpec(name="past", kind="sequence", of="item", max_length=4),
        FeatureSpec(name="past_brands", kind="sequence", of="brand", max_length=2),
        FeatureSpec(name="past_moods", kind="sequence", of="mood", max_length=4),
    ),
    user="user",
    item="item",
    time="time",
    tasks=("click", "order"),
)
NUMERIC = NumericTransforms.fit(
    {f.name: [np.arange(1, 9, dtype=np.float32)] for f in SCHEMA.features if f.kind == "numeric"},
    [f for f in SCHEMA.features if f.kind == "numeric"],
    8,
)
ENCODER = FeatureEncoder(SCHEMA, NUMERIC)


def catalogue() -> ArrowCatalogue:
    table = pa.table(
        {
            "item": ["1", "2", "книга", "🎈"],
            "brand": ["a", None, "b", "a"],
            "tags": ["x|y", "", None, "x|y|z|w"],
            "price": [1.0, None, 2.5, 4.0],
            "stars": [1, 2, None, 8],
        }
    )
    things = ArrowCatalogue(table, "item")
    for feature in SCHEMA.of_item():
        if feature.column in table.column_names:
            encoded = ENCODER.transform(feature, encode_raw(table.column(feature.column), feature))
            things.encoded[feature.name] = encoded.with_neutral(ENCODER.neutral(feature))
    return things


def ranking(request: str, user: str | int, items: Sequence[Any], **values: Any) -> RankingData:
    return RankingData(request, user, [RankedItem(item) for item in items], **values)


def columns(data: list[RankingData], seconds: float = 1_700_000_000.0) -> Rankings:
    """Rankings a second apart."""
    requests = fingerprints([its.request_id for its in data])
    return Rankings(data, requests, requests, seconds + np.arange(len(data)))


def as_request(data: RankingData) -> ScoreRequest:
    """What a scorer is asked with, for the same ranking."""
    user = data.user_features
    return ScoreRequest(
        user={"who": data.user} if user is None else user,
        history={"item": data.history or []},
        items=[str(item.id) for item in data.items],
        item_features=data.item_features or {},
        context=data.context or {},
    )
