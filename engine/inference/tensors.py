"""A request as tensors: told on one side, checked on the other."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from torch import Tensor

from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder
from engine.data.numeric import FAR
from engine.errors import RequestError
from engine.hashing import fingerprints
from engine.inference.signature import CANDIDATES, LENGTHS, Signature, TensorSpec
from engine.schema import FeatureSpec

MOST_ITEMS = 20_000
"""Candidates of a request: as many as a server may be told to allow."""


def encode(
    request: ScoreRequest, encoder: FeatureEncoder, catalogue: ArrowCatalogue, *, items_apart: bool
) -> dict[str, np.ndarray]:
    """A request as `Signature` describes, tensors of one dimension: candidates, the user, the context, the sequences.

    items_apart: with all features of the items, for one whose catalogue does not know them, or knows others; else only
    those that the request itself gives. No tensor is empty, but for candidates: what has no value is left out.
    SchemaError for a value that cannot be read.
    """
    prints = fingerprints(request.items)
    tensors = {CANDIDATES: prints}
    tensors.update((name, column.values) for name, column in encoder.encode_user(request).items())
    tensors.update((name, past) for name, (past, _) in encoder.encode_history(request.history, catalogue).items())
    told = [f for f in encoder.schema.of_item() if items_apart or f.name in request.item_features]
    tensors.update(_of_items(told, request, encoder, catalogue, prints))
    return {name: values for name, values in tensors.items() if len(values) or name == CANDIDATES}


def of_items(
    encoder: FeatureEncoder, catalogue: ArrowCatalogue, prints: np.ndarray, but: Container[str]
) -> dict[str, np.ndarray]:
    """What the catalogue says of candidates int64 [N], but for some features, as `encode` with `items_apart` does."""
    told = [f for f in encoder.schema.of_item() if f.name not in but]
    return _of_items(told, ScoreRequest({}, {}, []), encoder, catalogue, prints)


def _of_items(
    features: Sequence[FeatureSpec],
    request: ScoreRequest,
    encoder: FeatureEncoder,
    catalogue: ArrowCatalogue,
    prints: np.ndarray,
) -> dict[str, np.ndarray]:
    tensors = {}
    rows = catalogue.rows_of(prints) if features else prints
    for feature in features:
        if not encoder.names_item(feature):
            column = encoder.of_items(feature, request, catalogue, rows, prints)
            tensors[feature.name] = column.values
            if column.offsets is not None:
                tensors[feature.name + LENGTHS] = np.diff(column.offsets).astype(np.int32)
    return tensors


def checked(
    tensors: Mapping[str, np.ndarray | Tensor], signature: Signature, most_items: int = MOST_ITEMS
) -> dict[str, np.ndarray]:
    """The tensors as they may be scored: histories, and a user's several values, cut at their `max_length`.

    RequestError names the tensor that is missing or not known, of another type or length, or not finite.
    """
    if CANDIDATES not in tensors:
        raise RequestError(f"tensor '{CANDIDATES}' is missing: fingerprints of the items, int64 [N]")
    found = {}
    for name, tensor in tensors.items():
        spec = signature.by_name.get(name)
        if spec is None:
            raise _refused(name, f"the model has no such input{_hint(name, signature)}")
        found[name] = _values(tensor, spec)
    n = len(found[CANDIDATES])
    if n > most_items:
        raise _refused(CANDIDATES, f"{n} items in one request, at most {most_items} are scored")
    for name, values in found.items():
        spec = signature.by_name[name]
        wanted = {"one": 1, "candidates": n, "any": len(values)}[spec.rows]
        if len(values) != wanted:
            raise _refused(name, f"has {len(values)} values, {wanted} wanted for {n} candidates")
        if spec.is_lengths or (spec.rows == "any" and spec.feature is not None and not spec.feature.from_request):
            _check_lengths(spec, found)
    return found


def _values(tensor: np.ndarray | Tensor, spec: TensorSpec) -> np.ndarray:
    """Of the type and number of dimensions wanted, and fit for torch; numbers within what the encoder gives."""
    found = str(tensor.dtype).removeprefix("torch.")
    if found != spec.dtype.name:
        raise _refused(spec.name, f"is {found}, {spec.dtype.name} wanted")
    if tensor.ndim != 1:
        raise _refused(spec.name, f"has shape {[*tensor.shape]}, one dimension wanted")
    values = tensor.numpy() if isinstance(tensor, Tensor) else tensor
    if spec.rows == "any" and spec.feature is not None and spec.feature.from_request:
        values = values[: spec.feature.max_length]
    if spec.datatype == "FP32":
        if not np.isfinite(values).all():
            raise _refused(spec.name, "holds a number that is not finite; leave a feature out that is not known")
        values = np.clip(values, -FAR, FAR)
    return np.require(
        values, requirements=["C", "A", "W"]
    )  # what came over a wire may be read-only, which torch warns of


def _check_lengths(spec: TensorSpec, found: Mapping[str, np.ndarray]) -> None:
    """The values of an item feature of several, and how many each candidate has."""
    assert spec.feature is not None
    name = spec.feature.name
    lengths, values = found.get(name + LENGTHS), found.get(name, ())
    if lengths is None:
        raise _refused(name, f"needs '{name}{LENGTHS}', how many values each candidate has")
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= spec.feature.max_length:
        raise _refused(name + LENGTHS, f"must lie between 0 and {spec.feature.max_length}")
    if int(lengths.sum(dtype=np.int64)) != len(values):
        raise _refused(name, f"has {len(values)} values, but '{name}{LENGTHS}' sums to {lengths.sum(dtype=np.int64)}")


def _hint(name: str, signature: Signature) -> str:
    near = get_close_matches(name, signature.by_name, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(signature.by_name)}"


def _refused(name: str, why: str) -> RequestError:
    return RequestError(f"tensor '{name}': {why}")
