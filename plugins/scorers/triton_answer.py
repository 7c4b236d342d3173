"""What Triton answered, checked: nothing that is not one probability an item reaches a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import DeltaGap
from engine.inference.signature import VERSION
from engine.streaming.deltas.delta import parsed

_LONGEST_VERSION = 256


class CallFailed(Exception):
    """Triton gave no scores that can be used. reason: in short, one of a few; the message says all."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """task -> probabilities float32 [N]; version: what made them, of which `base` is the bundle's."""

    tasks: dict[str, np.ndarray]
    version: str
    base: str


def answer_of(response: Any, tasks: Sequence[str], n: int) -> Answer:
    """Of a ModelInferResponse. CallFailed, `wrong answer`, unless it has a probability an item for each task, and a
    version."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise _wrong(f"{len(response.outputs)} outputs, {len(response.raw_output_contents)} raw contents")
    found = {out.name: (out, raw) for out, raw in zip(response.outputs, response.raw_output_contents, strict=True)}
    version = version_in(found)
    return Answer({task: _probabilities(task, found.get(task), n) for task in tasks}, *version)


def version_in(found: Mapping[str, tuple[Any, bytes]]) -> tuple[str, str]:
    """(version, its base) of outputs by name."""
    output, raw = found.get(VERSION, (None, b""))
    if output is None or output.datatype != "UINT8" or not 0 < len(raw) <= _LONGEST_VERSION:
        raise _wrong(f"no output '{VERSION}' that says what scored: is it a model that plexrank exported?")
    try:
        version = raw.decode("utf-8")
        return version, parsed(version)[0]
    except (UnicodeDecodeError, DeltaGap) as error:
        raise _wrong(f"output '{VERSION}': {error}") from None


def _probabilities(task: str, found: tuple[Any, bytes] | None, n: int) -> np.ndarray:
    if found is None:
        raise _wrong(f"no output '{task}'")
    output, raw = found
    if output.datatype != "FP32" or tuple(output.shape) != (1, n) or len(raw) != 4 * n:
        raise _wrong(
            f"output '{task}': {output.datatype} {list(output.shape)} in {len(raw)} bytes; wanted FP32 [1, {n}]"
        )
    values = np.frombuffer(raw, dtype="<f4")
    if not (values.min() >= 0.0 and values.max() <= 1.0):  # false for NaN too
        raise _wrong(f"output '{task}': not one probability an item")
    return values


def _wrong(detail: str) -> CallFailed:
    return CallFailed("wrong answer", detail)
