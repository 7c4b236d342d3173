"""One number for all examples that were joined, in order, so that two replays of a log can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from engine.batch import Batch
from engine.data.encoding import ranges
from engine.schema import Schema
from engine.streaming.join.ready import Examples
from engine.streaming.join.thinning import finalised

BLOCK = 256
"""Examples that are digested at a time: where blocks begin follows from their number, not from how they came."""


class ExamplesDigest:
    """SHA-256 over examples, block by block, each with the digest of those before it.

    An example counts with its ids, features as the model reads them, labels, weight, rate, time and kind. A feature
    with any number of values counts by 64 bits of them all: that tells replays apart, it is no seal. Of equal models,
    equal partitions and equal `learning.chunk` a log gives the same, whatever the batches and the restarts are.
    """

    def __init__(self, schema: Schema) -> None:
        self.examples = 0
        self._schema = schema
        self._before = hashlib.sha256(b"plexrank.examples/1").digest()
        self._rest = b""  # of the block that is not full

    def add(self, batch: Batch, examples: Examples) -> None:
        """The next examples, with the batch of their features."""
        if not len(examples):
            return
        rows = np.concatenate([*_columns(self._schema, batch, examples)], axis=1)
        whole = memoryview(self._rest + rows.tobytes())
        size = BLOCK * rows.shape[1]
        full = len(whole) // size * size
        for start in range(0, full, size):
            self._before = hashlib.sha256(self._before + whole[start : start + size]).digest()
        self._rest = bytes(whole[full:])
        self.examples += len(examples)

    def hexdigest(self) -> str:
        """Of all so far, 64 hexadecimal digits."""
        return hashlib.sha256(self._before + self._rest).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """How many, and their digest."""
        return {"count": self.examples, "sha256": self.hexdigest()}

    def copy(self) -> Self:
        other = type(self)(self._schema)
        other.load(self.state())
        return other

    def state(self) -> dict[str, np.ndarray]:
        return {
            "examples": np.array([self.examples]),
            "before": np.frombuffer(self._before, np.uint8),
            "rest": np.frombuffer(self._rest, np.uint8),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self.examples = int(state["examples"][0])
        self._before, self._rest = state["before"].tobytes(), state["rest"].tobytes()


def _columns(schema: Schema, batch: Batch, examples: Examples) -> Iterator[np.ndarray]:
    """Bytes uint8 [n, k] of n examples, a few columns at a time, always the same ones."""
    for name in ("request", "item", "labels", "weight", "rate", "seconds", "kind"):
        yield _bytes(getattr(examples, name))
    for name, jagged in batch.jagged().items():
        values = jagged.values().numpy()
        yield _bytes(_folded(values, jagged.lengths().numpy()) if schema[name].is_jagged else values)
    for numbers in (batch.dense_user, batch.dense_item):
        yield _bytes(numbers.numpy())
    for key in (batch.time, batch.user_key):
        if key is not None:
            yield _bytes(key.numpy())


def _bytes(column: np.ndarray) -> np.ndarray:
    """[n] or [n, k] -> its bytes, a row a row."""
    return np.ascontiguousarray(column).reshape(len(column), -1).view(np.uint8)


def _folded(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 [n] of int64 values behind one another: their number, and the sum of each mixed with its place."""
    lengths = lengths.astype(np.int64)
    place = ranges(np.zeros_like(lengths), lengths).view(np.uint64)
    mixed = finalised(values.view(np.uint64) ^ finalised(place + np.uint64(1)))
    reach = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    ends = np.cumsum(lengths)
    return reach[ends] - reach[ends - lengths] + finalised(lengths.view(np.uint64))
