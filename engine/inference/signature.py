"""The tensors that a model takes and gives: names, types, lengths, and which may be left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np

from engine.errors import SchemaError
from engine.schema import FeatureSpec, Schema

CANDIDATES = "candidates"
"""Input: fingerprints of the items to score."""
VERSION = "version"
"""Output: UTF-8 of the version that scored."""
LENGTHS = ".lengths"
"""Behind the name of an item feature of several values: the input with how many each candidate has."""

Datatype = Literal["INT64", "INT32", "FP32", "UINT8"]
Rows = Literal["one", "any", "candidates"]

DTYPES: Mapping[Datatype, np.dtype] = {
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "FP32": np.dtype(np.float32),
    "UINT8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of one dimension. rows: its length: one, as many as there are candidates, or any number.

    feature: whose values an input holds; None for the candidates.
    """

    name: str
    datatype: Datatype
    rows: Rows
    optional: bool = False
    feature: FeatureSpec | None = None

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.datatype]

    @property
    def is_lengths(self) -> bool:
        """Whether it counts the values of an item feature, in place of holding them."""
        return self.feature is not None and self.name != self.feature.name


@dataclass(frozen=True)
class Signature:
    """What a model reads and answers, for any transport; ids are fingerprints (`engine.hashing`), not texts.

    Inputs: `candidates` int64 [N]; each feature of the user or context: int64 [1] (of several values: [n]), or float32
    [1] transformed; each sequence: int64 [H], newest first; each item feature: int64 or float32 [N], or of several
    values int64 [T] with `NAME.lengths` int32 [N]. All but the candidates may be left out: a feature of the request
    then is not known, a history empty, and an item's is what the catalogue of the bundle says of each candidate. A
    feature that is the item's id itself is no input: the candidates say it.
    Outputs: each task: float32 [N], calibrated probabilities; `version`: uint8 [V].
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, schema: Schema) -> Self:
        """SchemaError where a feature or a task has the name of another tensor."""
        inputs = [TensorSpec(CANDIDATES, "INT64", "candidates")]
        for feature in schema.features:
            if not schema.names_item(feature):
                inputs += _inputs_of(feature)
        outputs = [TensorSpec(task, "FP32", "candidates") for task in schema.tasks]
        outputs.append(TensorSpec(VERSION, "UINT8", "any"))
        _check_names("feature", [spec.name for spec in inputs])
        _check_names("task", [spec.name for spec in outputs][::-1])
        return cls(tuple(inputs), tuple(outputs))

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        """name -> input."""
        return {spec.name: spec for spec in self.inputs}


def _inputs_of(feature: FeatureSpec) -> list[TensorSpec]:
    name = feature.name
    if feature.from_request:
        datatype: Datatype = "FP32" if feature.is_dense else "INT64"
        return [TensorSpec(name, datatype, "any" if feature.is_jagged else "one", True, feature)]
    if feature.is_jagged:
        return [
            TensorSpec(name, "INT64", "any", True, feature),
            TensorSpec(name + LENGTHS, "INT32", "candidates", True, feature),
        ]
    return [TensorSpec(name, "FP32" if feature.is_dense else "INT64", "candidates", True, feature)]


def _check_names(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SchemaError(f"{what} '{name}' has the name of another tensor of the model; rename it")
        seen.add(name)
