"""Deltas as bytes: parts that a log takes, each with its place and checksums; equal deltas have equal bytes.

A part: `PXD1`, sha256 of all that follows (32 bytes), length of the header (uint32, little endian), header (JSON),
a slice of the payload. The payload is safetensors: `rows/<table>` int64, `values/<table>` float32 or int8 with
`scales/<table>` float32, `dense/<name>`, `vectors/values` float32, `vectors/ids` (UTF-8) with `vectors/ends` int64.
"""

from __future__ import annotations

import hashlib
import math
import struct
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.bundle.tensors import finite
from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta, ItemVectors, TableRows, version_of

MAGIC = b"PXD1"
FORMAT: Literal[1] = 1
MOST_PAYLOAD = 1 << 30
MOST_HEADER = 1 << 17
MOST_PARTS = 1 << 16
LEAST_SLICE = 1024
Dtype = Literal["float32", "int8"]

_PREFIX = struct.Struct("<4s32sI")
_FLOAT32 = np.finfo(np.float32)
_MOST_SCALE = np.nextafter(np.float32(_FLOAT32.max / 127), np.float32(0))  # 127 of it are still finite

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a part says of itself and of the delta that it is a part of.

    part: 0, 1, ... of `parts`. bytes, sha256: of the whole payload. newest: None for NaN.
    """

    format: Literal[1]
    model: _Name
    base: _Name
    epoch: _Count
    sequence: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
    follows: _Count
    parent: str
    version: str
    created: float
    newest: float | None
    positions: dict[int, _Count]
    dtype: Dtype
    part: _Count
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_PAYLOAD)]
    sha256: _Digest

    @property
    def place(self) -> tuple[str, str, int, int]:
        """Orders the deltas of one model and base."""
        return self.model, self.base, self.epoch, self.sequence


def encode(delta: Delta, dtype: Dtype, most_bytes: int = 900_000) -> list[bytes]:
    """The parts of a delta, each at most `most_bytes` long.

    dtype: of the rows' values. float32 is exact; int8 has one scale a row and errs by at most 1/254 of the row's
        largest magnitude (symmetric quantisation). Dense parameters and items' vectors are exact in both.
    BundleError: numbers that are not finite, rows that do not ascend, names that are none, more than a delta may hold.
    """
    payload = save(_tensors(delta, dtype))
    whole = hashlib.sha256(payload).hexdigest()
    if len(payload) > MOST_PAYLOAD:
        raise BundleError(
            f"{delta.model} {delta.version}: {len(payload):,} bytes; a delta has at most {MOST_PAYLOAD:,}: "
            "publish a bundle"
        )
    room = most_bytes - _PREFIX.size - len(_header(delta, dtype, MOST_PARTS, MOST_PARTS, MOST_PAYLOAD, whole))
    if room < LEAST_SLICE:
        raise BundleError(f"{delta.model} {delta.version}: no room in parts of {most_bytes:,} bytes")
    starts = range(0, len(payload), room)
    if len(starts) > MOST_PARTS:
        raise BundleError(f"{delta.model} {delta.version}: {len(starts):,} parts; at most {MOST_PARTS:,}: larger parts")
    parts = []
    for number, start in enumerate(starts):
        header = _header(delta, dtype, number, len(starts), len(payload), whole)
        body = b"".join((struct.pack("<I", len(header)), header, payload[start : start + room]))
        parts.append(b"".join((MAGIC, hashlib.sha256(body).digest(), body)))
    read_header(parts[0])
    return parts


def _header(delta: Delta, dtype: Dtype, part: int, parts: int, size: int, digest: str) -> bytes:
    encoded = msgspec.json.encode(
        Header(
            format=FORMAT,
            model=delta.model,
            base=delta.base,
            epoch=delta.epoch,
            sequence=delta.sequence,
            follows=delta.after,
            parent=delta.parent,
            version=delta.version,
            created=float(delta.created),
            newest=None if math.isnan(delta.newest) else float(delta.newest),
            positions={int(p): int(delta.positions[p]) for p in sorted(delta.positions)},
            dtype=dtype,
            part=part,
            parts=parts,
            bytes=size,
            sha256=digest,
        )
    )
    if len(encoded) > MOST_HEADER:
        raise BundleError(f"{delta.model} {delta.version}: positions of too many partitions for one delta")
    return encoded


def _tensors(delta: Delta, dtype: Dtype) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, table in delta.tables.items():
        where = f"{delta.model} {delta.version}: table {name}"
        rows = np.ascontiguousarray(table.rows, np.int64)
        values = np.ascontiguousarray(table.values, np.float32)
        _check_rows(where, rows, values)
        found[f"rows/{name}"] = torch.from_numpy(rows)
        if dtype == "int8":
            quantised, scales = quantise(values)
            found[f"values/{name}"] = torch.from_numpy(quantised)
            found[f"scales/{name}"] = torch.from_numpy(scales)
        else:
            found[f"values/{name}"] = torch.from_numpy(values)
    for name, tensor in delta.dense.items():
        if not finite(tensor):
            raise BundleError(f"{delta.model} {delta.version}: {name}: not finite; the training diverged")
        found[f"dense/{name}"] = tensor.detach().cpu().contiguous().clone()
    if delta.vectors is not None:
        where = f"{delta.model} {delta.version}: items' vectors"
        values = np.ascontiguousarray(delta.vectors.values, np.float32)
        encoded = [item.encode() for item in delta.vectors.ids]
        ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        _check_matrix(where, len(encoded), values)
        found["vectors/values"] = torch.from_numpy(values)
        found["vectors/ids"] = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        found["vectors/ends"] = torch.from_numpy(ends)
    return found


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, dim] -> int8 [n, dim] and the scales float32 [n]; value = integer * scale of its row."""
    largest = np.abs(values).max(axis=1, initial=0.0)
    scales = np.clip(largest / np.float32(127), _FLOAT32.tiny, _MOST_SCALE).astype(np.float32)
    return np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8), scales


def read_header(part: bytes) -> Header:
    """What a part says of itself; its checksum is not looked at yet. BundleError where it is no part."""
    if len(part) < _PREFIX.size:
        raise BundleError(f"{len(part)} bytes are no part of a delta")
    magic, _, length = _PREFIX.unpack_from(part)
    if magic != MAGIC:
        raise BundleError("no part of a delta: it does not begin with PXD1")
    if length > MOST_HEADER or _PREFIX.size + length > len(part):
        raise BundleError("a part of a delta is truncated in its header")
    try:
        header = msgspec.json.decode(part[_PREFIX.size : _PREFIX.size + length], type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"a part's header cannot be read: {error}") from None
    if not (math.isfinite(header.created) and (header.newest is None or math.isfinite(header.newest))):
        raise BundleError("a part's header has times that are not finite")
    names = [version_of(header.base, header.epoch, n) for n in (header.follows, header.sequence)]
    if [header.parent, header.version] != names or header.follows >= header.sequence or header.part >= header.parts:
        raise BundleError(f"{header.model} {header.version[:100]}: the header disagrees with itself")
    return header


def read_part(part: bytes) -> tuple[Header, bytes]:
    """Header and slice of the payload, checked against the part's checksum."""
    header = read_header(part)
    _, digest, length = _PREFIX.unpack_from(part)
    if hashlib.sha256(memoryview(part)[36:]).digest() != digest:
        raise BundleError(f"{header.model} {header.version}: part {header.part + 1} of {header.parts} is damaged")
    return header, part[_PREFIX.size + length :]


def decode(header: Header, payload: bytes) -> Delta:
    """The delta of a whole payload. BundleError: checksum, numbers that are not finite, rows that do not ascend."""
    where = f"{header.model} {header.version}"
    if len(payload) != header.bytes or hashlib.sha256(payload).hexdigest() != header.sha256:
        raise BundleError(f"{where}: its parts do not make the payload of its checksum")
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise BundleError(f"{where}: cannot be read as safetensors: {error}") from None
    parts: dict[str, dict[str, Tensor]] = {k: {} for k in ("rows", "values", "scales", "dense", "vectors")}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in parts or not rest:
            raise BundleError(f"{where}: unknown entry '{name[:100]}'")
        parts[kind][rest] = tensor
    for name, tensor in parts["dense"].items():
        if not finite(tensor):
            raise BundleError(f"{where}: {name}: not finite")
    if parts["rows"].keys() != parts["values"].keys():
        raise BundleError(f"{where}: rows and values are of different tables")
    if not parts["scales"].keys() <= parts["rows"].keys():
        raise BundleError(f"{where}: scales of a table without rows")
    return Delta(
        model=header.model,
        base=header.base,
        epoch=header.epoch,
        sequence=header.sequence,
        follows=None if header.follows == header.sequence - 1 else header.follows,
        created=header.created,
        newest=math.nan if header.newest is None else header.newest,
        tables={
            name: _table(f"{where}: table {name}", rows, parts["values"][name], parts["scales"].get(name))
            for name, rows in parts["rows"].items()
        },
        dense=parts["dense"],
        vectors=_vectors(f"{where}: items' vectors", parts["vectors"]) if parts["vectors"] else None,
        positions=header.positions,
    )


def _table(where: str, rows: Tensor, values: Tensor, scales: Tensor | None) -> TableRows:
    if rows.dtype != torch.int64 or values.dtype != (torch.float32 if scales is None else torch.int8):
        raise BundleError(f"{where}: rows of {rows.dtype} or values of {values.dtype}")
    numbers = values.numpy()
    if scales is not None:
        if scales.dtype != torch.float32 or scales.shape != rows.shape or values.dim() != 2:
            raise BundleError(f"{where}: not one scale a row")
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = numbers.astype(np.float32) * scales.numpy()[:, None]
    table = TableRows(rows.numpy(), numbers)
    _check_rows(where, table.rows, table.values)
    return table


def _vectors(where: str, parts: dict[str, Tensor]) -> ItemVectors:
    if parts.keys() != {"values", "ids", "ends"}:
        raise BundleError(f"{where}: {', '.join(sorted(parts))} in place of values, ids and ends")
    values, text, ends = parts["values"], parts["ids"], parts["ends"]
    if (values.dtype, text.dtype, ends.dtype) != (torch.float32, torch.uint8, torch.int64) or ends.dim() != 1:
        raise BundleError(f"{where}: of wrong types")
    _check_matrix(where, len(ends), values.numpy())
    limits = [0, *ends.tolist()]
    if text.dim() != 1 or limits[-1] != len(text) or any(a > b for a, b in pairwise(limits)):
        raise BundleError(f"{where}: ids do not end where they should")
    raw = text.numpy().tobytes()
    try:
        ids = [raw[a:b].decode() for a, b in pairwise(limits)]
    except UnicodeDecodeError:
        raise BundleError(f"{where}: ids are not UTF-8") from None
    return ItemVectors(ids, values.numpy())


def _check_rows(where: str, rows: np.ndarray, values: np.ndarray) -> None:
    if rows.ndim != 1 or (len(rows) and (rows[0] < 0 or not (rows[1:] > rows[:-1]).all())):
        raise BundleError(f"{where}: rows are not ascending and distinct")
    _check_matrix(where, len(rows), values)


def _check_matrix(where: str, count: int, values: np.ndarray) -> None:
    if values.ndim != 2 or len(values) != count:
        raise BundleError(f"{where}: values of shape {values.shape} for {count} rows")
    if not np.isfinite(values).all():
        raise BundleError(f"{where}: values are not finite; the training diverged, or they were changed on the way")
