"""Open Inference Protocol (KServe v2) over HTTP: a request's tensors as JSON or behind it as bytes, and back.

The extension of binary tensors is Triton's: the header `Inference-Header-Content-Length` says where the JSON ends, and
each tensor's `binary_data_size` how much of what follows is its. BYTES are length-prefixed (uint32, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from engine.errors import RequestError

DTYPES: dict[str, np.dtype[Any]] = {
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "UINT8": np.dtype("u1"),
}
BYTES = "BYTES"
HEADER = "inference-header-content-length"
MOST_TEXTS = 20_000
"""Of one tensor: as many as a server may be told to allow items in a request."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = frozenset({"INT32", "INT64", "UINT8"})


class TensorParameters(Struct, frozen=True):
    """What may stand beside a tensor; others are passed over."""

    binary_data_size: Annotated[int, Meta(ge=0)] | None = None
    binary_data: bool | None = None


class TensorIn(Struct):
    """One input: its values in `data`, flat or nested, or behind the JSON."""

    name: Annotated[str, Meta(max_length=128)]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=8)]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class WantedOut(Struct):
    """An output that is asked for."""

    name: Annotated[str, Meta(max_length=128)]
    parameters: TensorParameters = TensorParameters()


class InferParameters(Struct, frozen=True):
    """timeout: microseconds until an answer is of use; others are passed over."""

    binary_data_output: bool = False
    timeout: Annotated[int, Meta(ge=1, le=60_000_000)] | None = None


class InferIn(Struct):
    """A request of the Open Inference Protocol."""

    inputs: Annotated[list[TensorIn], Meta(max_length=1024)]
    id: Annotated[str, Meta(max_length=256)] = ""
    parameters: InferParameters = InferParameters()
    outputs: Annotated[list[WantedOut], Meta(max_length=1024)] | None = None


class TensorOut(Struct, omit_defaults=True):
    """One output."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferOut(Struct, omit_defaults=True):
    """An answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    outputs: list[TensorOut]
    id: str = ""


class TensorMetadata(Struct):
    """An input or output of a model; -1 stands for any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    """A model, its versions, its tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(Struct):
    """This server."""

    name: str
    version: str
    extensions: list[str]


class LiveOut(Struct):
    """Whether the process answers."""

    live: bool


class ReadyState(Struct):
    """Whether a real scoring was done."""

    ready: bool


class ModelReady(Struct):
    """Whether a real scoring of this model was done."""

    name: str
    ready: bool


class OipError(Struct):
    """The protocol's error."""

    error: str


STRUCTS: list[type[Any]] = [
    InferIn,
    InferOut,
    ModelMetadata,
    ServerMetadata,
    LiveOut,
    ReadyState,
    ModelReady,
    OipError,
]

_decoder = msgspec.json.Decoder(InferIn)


@dataclass
class Infer:
    """A request, read. tensors: name -> 1-d array, or the texts of BYTES; binary: outputs wanted as bytes."""

    id: str
    timeout_us: int | None
    tensors: dict[str, np.ndarray | list[str]]
    wanted: list[str] | None
    binary: set[str] = field(default_factory=set)
    binary_by_default: bool = False


def read(body: bytes, header_length: str | None) -> Infer:
    """A body -> its tensors, each of shape [1, n] or [n]. RequestError (400) names what does not fit."""
    end = len(body)
    if header_length is not None:
        digits = header_length.isascii() and header_length.isdigit() and len(header_length) <= len(str(end))
        if not (digits and int(header_length) <= end):
            raise _malformed(f"{HEADER} is no number of bytes of the body")
        end = int(header_length)
    try:
        asked = _decoder.decode(memoryview(body)[:end])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as error:
        raise _malformed(f"the request cannot be read: {error}") from None
    tensors: dict[str, np.ndarray | list[str]] = {}
    place = end
    for tensor in asked.inputs:
        if tensor.name in tensors:
            raise _malformed(f"input '{tensor.name}' is given twice")
        count = _count(tensor)
        size = tensor.parameters.binary_data_size
        if size is None:
            tensors[tensor.name] = _from_json(tensor, count)
        else:
            if place + size > len(body):
                raise _malformed(f"input '{tensor.name}': its {size} bytes are not in the body")
            tensors[tensor.name] = _from_bytes(tensor, count, memoryview(body)[place : place + size])
            place += size
    if place != len(body):
        raise _malformed(f"{len(body) - place} bytes behind the last tensor belong to none")
    wanted = None if asked.outputs is None else [out.name for out in asked.outputs]
    binary = {out.name for out in asked.outputs or () if out.parameters.binary_data}
    return Infer(asked.id, asked.parameters.timeout, tensors, wanted, binary, asked.parameters.binary_data_output)


def write(infer: Infer, outputs: Mapping[str, np.ndarray], model: str, version: str) -> tuple[bytes, int | None]:
    """Outputs, 1-d arrays, as [1, n] -> (body, length of its JSON where tensors follow it, else None).

    RequestError (400) for an output that is asked for and that the model does not have.
    """
    names = list(outputs) if infer.wanted is None else infer.wanted
    described, blobs = [], []
    for name in names:
        values = outputs.get(name)
        if values is None:
            raise _malformed(f"the model has no output '{name}'; it has {', '.join(outputs)}")
        out = TensorOut(name, _NAMES[values.dtype.newbyteorder("<")], [1, len(values)])
        if name in infer.binary or (infer.binary_by_default and infer.wanted is None):
            blobs.append(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
            out.parameters = {"binary_data_size": len(blobs[-1])}
        else:
            out.data = values.tolist()
        described.append(out)
    text = msgspec.json.encode(InferOut(model, version, described, infer.id))
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


def _count(tensor: TensorIn) -> int:
    if tensor.datatype != BYTES and tensor.datatype not in DTYPES:
        known = ", ".join([*DTYPES, BYTES])
        raise _malformed(f"input '{tensor.name}': datatype '{tensor.datatype}' is not one of {known}")
    shape = tensor.shape
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
        raise _malformed(f"input '{tensor.name}' has shape {shape}; one request's is [1, n]")
    count = prod(shape)
    if tensor.datatype == BYTES and count > MOST_TEXTS:
        raise _malformed(f"input '{tensor.name}': {count} texts are more than {MOST_TEXTS}")
    return count


def _from_json(tensor: TensorIn, count: int) -> np.ndarray | list[str]:
    data = tensor.data
    if data is None:
        raise _malformed(f"input '{tensor.name}' has neither data nor binary_data_size")
    if len(data) == 1 and isinstance(data[0], list):
        data = data[0]
    if len(data) != count:
        raise _malformed(f"input '{tensor.name}' has {len(data)} values; its shape says {count}")
    kinds = set(map(type, data))
    if tensor.datatype == BYTES:
        if not kinds <= {str}:
            raise _malformed(f"input '{tensor.name}' is BYTES; its values must be strings")
        return data
    integers = tensor.datatype in _INTEGERS
    if not kinds <= ({int} if integers else {int, float}):
        raise _malformed(f"input '{tensor.name}': not every value is {'an integer' if integers else 'a number'}")
    try:
        with np.errstate(over="ignore"):
            return np.array(data, dtype=DTYPES[tensor.datatype])
    except (OverflowError, ValueError):
        raise _malformed(f"input '{tensor.name}': a value is too large for {tensor.datatype}") from None


def _from_bytes(tensor: TensorIn, count: int, data: memoryview) -> np.ndarray | list[str]:
    if tensor.datatype == BYTES:
        return _texts(tensor.name, count, data)
    dtype = DTYPES[tensor.datatype]
    if len(data) != count * dtype.itemsize:
        raise _malformed(f"input '{tensor.name}' has {len(data)} bytes; its shape says {count * dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype)


def _texts(name: str, count: int, data: memoryview) -> list[str]:
    """Length-prefixed texts."""
    ends, place = [0], 0
    while place < len(data) and len(ends) <= count:
        if place + 4 > len(data):
            break
        place += 4 + struct.unpack_from("<I", data, place)[0]
        ends.append(place)
    if place != len(data) or len(ends) != count + 1:
        raise _malformed(f"input '{name}': its bytes are not {count} texts, each behind its length as uint32")
    try:
        return [str(data[begin + 4 : end], "utf-8") for begin, end in pairwise(ends)]
    except UnicodeDecodeError:
        raise _malformed(f"input '{name}' holds bytes that are not UTF-8") from None


def described(specs: Sequence[Any]) -> list[TensorMetadata]:
    """A signature's tensors (name, datatype) as the protocol describes them."""
    return [TensorMetadata(spec.name, spec.datatype, [-1, -1]) for spec in specs]


def _malformed(text: str) -> RequestError:
    return RequestError(text, status=400)
