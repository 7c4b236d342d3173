"""The encoder of a schema: raw values to a Batch, with the same ids and numbers in training and in serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.batch import Batch, keyed_jagged
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoding import (
    MISSING,
    ArrowColumn,
    Encoded,
    arrow_column,
    encode_raw,
    is_missing,
    taken,
)
from engine.data.numeric import NumericTransforms
from engine.errors import SchemaError
from engine.hashing import fingerprints
from engine.schema import FeatureSpec, Schema

Values = tuple[np.ndarray, np.ndarray | None]
"""Values behind one another and the lengths of rows, None where each row has one."""


class FeatureEncoder:
    """Raw columns and requests to ids and numbers."""

    def __init__(self, schema: Schema, numeric: NumericTransforms) -> None:
        self.schema = schema
        self.numeric = numeric
        self._embedded = schema.embedded
        self._dense_user = [f for f in schema.dense if f.from_request]
        self._dense_item = [f for f in schema.dense if not f.from_request]

    # -------------------------------------------------------------------------------------------- columns
    def encode(self, columns: Mapping[str, ArrowColumn]) -> dict[str, Encoded]:
        """feature -> encoded column, for Arrow columns by feature name. SchemaError names what does not fit."""
        return {name: self.encode_column(name, column) for name, column in columns.items()}

    def encode_column(self, name: str, column: ArrowColumn) -> Encoded:
        feature = self.schema[name]
        return self.transform(feature, encode_raw(column, feature))

    def encode_values(self, name: str, values: Sequence[Any]) -> Encoded:
        """A request's raw values -> the same ids and numbers as `encode_column` gives for a stored column."""
        feature = self.schema[name]
        if feature.kind == "categorical":
            return Encoded(fingerprints("" if is_missing(v) else v for v in values))
        return self.transform(feature, encode_raw(arrow_column(values, feature), feature))

    def transform(self, feature: FeatureSpec, raw: Encoded) -> Encoded:
        """The numeric transform of a raw column; other kinds stay as they are."""
        return Encoded(self.numeric[feature.name](raw.values)) if feature.kind == "numeric" else raw

    def neutral(self, feature: FeatureSpec) -> int | float:
        """What a value that is not known reads as."""
        return 0.0 if feature.is_dense else MISSING

    # -------------------------------------------------------------------------------------------- batches
    def assemble(self, ids: Mapping[str, Values], numbers: Mapping[str, np.ndarray], users: int, targets: int) -> Batch:
        """A batch from values by feature name: every embedded feature in `ids`, every dense one in `numbers`."""
        return Batch(
            ids=keyed_jagged({f.name: ids[f.name] for f in self._embedded}),
            dense_user=self.dense(numbers, of_items=False, rows=users),
            dense_item=self.dense(numbers, of_items=True, rows=targets),
            user_of_target=torch.arange(targets) if users == targets else torch.zeros(targets, dtype=torch.int64),
        )

    def encode_request(self, request: ScoreRequest, catalogue: ArrowCatalogue, rows: np.ndarray | None = None) -> Batch:
        """One user, N candidates -> a Batch with U = 1.

        rows: int64 [N], the candidates' catalogue rows where the caller has them (-1: unknown), else looked up by id.
        An item's features come from the catalogue, except where `item_features` names them (None keeps the
        catalogue's). User and context features are looked for by name in `user` and `context`. A sequence is taken from
        `history` by its name, else from the catalogue for the item ids listed under the schema's item column or under
        another sequence that holds item ids. What is not there reads as missing.
        """
        targets = len(request.items)
        prints: np.ndarray | None = None
        if rows is None:
            prints = fingerprints(request.items)
            rows = catalogue.rows_of(prints)
        encoded = self.encode_user(request)
        for feature in self.schema.features:
            if not feature.from_request and feature.kind != "sequence":
                encoded[feature.name] = self.of_items(feature, request, catalogue, rows, prints)
        ids, numbers = self.parted(encoded)
        ids.update(self.encode_history(request.history, catalogue))
        return self.assemble(ids, numbers, 1, targets)

    def encode_user(self, request: ScoreRequest) -> dict[str, Encoded]:
        """The user's and the context's features, one row each, without sequences."""
        user, context = request.user, request.context
        wanted = [f.name for f in self.schema.of_request() if f.kind != "sequence"]
        return {name: self.encode_values(name, [user.get(name, context.get(name))]) for name in wanted}

    def encode_items(
        self, catalogue: ArrowCatalogue, rows: np.ndarray, only: Sequence[str] | None = None
    ) -> dict[str, Encoded]:
        """The items' features, or `only` these, for catalogue rows int64 [n], all of them known."""
        request, prints = ScoreRequest({}, {}, [""] * len(rows)), catalogue.prints[rows]
        items = [f for f in self.schema.features if not f.from_request and f.kind != "sequence"]
        items = items if only is None else [f for f in items if f.name in only]
        return {f.name: self.of_items(f, request, catalogue, rows, prints) for f in items}

    def parted(self, encoded: Mapping[str, Encoded]) -> tuple[dict[str, Values], dict[str, np.ndarray]]:
        """Encoded columns -> (those that are embedded, with lengths; the dense ones), as `assemble` takes them."""
        ids: dict[str, Values] = {}
        numbers: dict[str, np.ndarray] = {}
        for name, column in encoded.items():
            if self.schema[name].is_dense:
                numbers[name] = column.values
            else:
                offsets = column.offsets
                ids[name] = (column.values, None if offsets is None else offsets[1:] - offsets[:-1])
        return ids, numbers

    def dense(self, numbers: Mapping[str, np.ndarray], *, of_items: bool, rows: int) -> torch.Tensor:
        """The dense features of one side -> float32 [rows, n], in the schema's order."""
        return _matrix([numbers[f.name] for f in (self._dense_item if of_items else self._dense_user)], rows)

    def names_item(self, feature: FeatureSpec) -> bool:
        """Whether the feature is the item's id."""
        return self.schema.names_item(feature)

    def of_items(
        self,
        feature: FeatureSpec,
        request: ScoreRequest,
        catalogue: ArrowCatalogue,
        rows: np.ndarray,
        prints: np.ndarray | None,
    ) -> Encoded:
        """One feature of the items at catalogue rows int64 [n] (-1: unknown), whose ids `request` or `prints` give."""
        given = request.item_features.get(feature.name)
        if given is not None and len(given) != len(rows):
            raise SchemaError(f"item_features.{feature.name} has {len(given)} values for {len(rows)} items")
        if self.names_item(feature):
            return Encoded(fingerprints(request.items) if prints is None else prints)
        known = catalogue.encoded.get(feature.name)
        if known is None:
            return self.encode_values(feature.name, [None] * len(rows) if given is None else given)
        stored = taken(known, rows)
        if given is None:
            return stored
        absent = np.fromiter((is_missing(v) for v in given), dtype=bool, count=len(given))
        return _choose(absent, stored, self.encode_values(feature.name, given))

    def encode_history(self, given: Mapping[str, Sequence[Any]], catalogue: ArrowCatalogue) -> dict[str, Values]:
        """Each sequence's values, newest first and capped, with its one length."""
        out: dict[str, Values] = {}
        items = given.get(self.schema.item) if self.schema.item else None
        for sequence in self.schema.sequences:
            raw = given.get(sequence.name)
            if raw is not None:
                values = fingerprints("" if is_missing(v) else v for v in raw[: sequence.max_length])
                out[sequence.name] = (values, np.array([len(values)]))
                if items is None and sequence.of and self.names_item(self.schema[sequence.of]):
                    items = raw
        longest = max((s.max_length for s in self.schema.sequences), default=0)
        past = fingerprints(items[:longest]) if items is not None else None
        for sequence in self.schema.sequences:
            if sequence.name in out:
                continue
            values = np.empty(0, dtype=np.int64)
            if past is not None and sequence.of:
                if self.names_item(self.schema[sequence.of]):
                    values = past[: sequence.max_length]
                elif (known := catalogue.encoded.get(sequence.of)) is not None:
                    values, _ = known.take(catalogue.rows_of(past[: sequence.max_length]))
            out[sequence.name] = (values, np.array([len(values)]))
        return out


def _matrix(columns: list[np.ndarray], rows: int) -> torch.Tensor:
    if not columns:
        return torch.empty(rows, 0)
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32, copy=False))


def _choose(first: np.ndarray, a: Encoded, b: Encoded) -> Encoded:
    """Row by row from `a` where `first` (bool [n]), else from `b`."""
    if a.offsets is None or b.offsets is None:
        return Encoded(np.where(first, a.values, b.values))
    rows = np.arange(len(first)) + np.where(first, 0, len(a))
    offsets = np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]])
    return taken(Encoded(np.concatenate([a.values, b.values]), offsets), rows)
