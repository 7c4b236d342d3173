"""Ids to rows, the same in batch, stream and serving, on any machine, without a dictionary.

Two steps. An id's text is hashed once per distinct value to a 64-bit *fingerprint* (mmh3, x64 128-bit variant,
low half, seed 0): the integer 42 and the string "42" are one id. A table row is then a seeded mix of the
fingerprint (murmur3's 64-bit finaliser) reduced to the table's rows; the seed comes from the *name* of the
feature's space and the number of the lookup, so adding a feature never reshuffles another.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import mmh3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

_M1 = 0xFF51AFD7ED558CCD
_M2 = 0xC4CEB9FE1A85EC53
_MASK = (1 << 64) - 1


def canonical(value: object) -> str:
    """The text that stands for an id: `42`, `42.0` and `"42"` are the same id; booleans are `true`, `false`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def fingerprint(value: object) -> int:
    """A signed 64-bit fingerprint of one id."""
    return mmh3.hash64(canonical(value).encode(), 0, True, True)[0]


def fingerprints(values: Iterable[object]) -> np.ndarray:
    """Fingerprints of a short list of ids (a request's candidates) -> int64 [n]."""
    texts = [v if type(v) is str else canonical(v) for v in values]
    digests = b"".join(map(mmh3.mmh3_x64_128_digest, map(str.encode, texts)))  # a third of the time of `fingerprint`
    return np.frombuffer(digests, dtype="<i8")[::2].astype(np.int64)


def fingerprint_column(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Fingerprints of an Arrow column of ids -> int64 [n]; each distinct value is hashed once.

    Nulls become the fingerprint of the empty string. Floats that are whole numbers count as integers.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # zero or several chunks survive combining
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_null(column.type):
        return np.full(len(column), fingerprint(""), dtype=np.int64)
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    distinct = fingerprints("" if v is None else v for v in column.dictionary.to_pylist())
    codes = column.indices
    if column.null_count:
        distinct = np.append(distinct, fingerprint(""))
        codes = pc.fill_null(codes.cast(pa.int64()), len(distinct) - 1)
    return distinct[codes.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)]


@lru_cache(maxsize=4096)
def seed_of(space: str, lookup: int = 0) -> int:
    """The signed 64-bit seed of one lookup of one space, from names alone."""
    return mmh3.hash64(f"{space}#{lookup}".encode(), 0, True, True)[0]


def mix(prints: Tensor, seed: int | Tensor) -> Tensor:
    """murmur3's 64-bit finaliser of `prints ^ seed`, int64 in, non-negative int64 out (top bit cleared).

    `seed` is one integer or a tensor that broadcasts against `prints`.
    """
    h = prints ^ seed
    shifted = torch.empty_like(h)  # in place from here: the intermediate results of a batch stay in the cache
    for multiplier in (_M1, _M2):
        h.bitwise_xor_(_shift(h, 33, shifted)).mul_(_signed(multiplier))
    return h.bitwise_xor_(_shift(h, 33, shifted)).bitwise_and_(0x7FFFFFFFFFFFFFFF)


def rows_of(prints: Tensor, space: str, lookup: int, rows: int) -> Tensor:
    """Rows in [0, rows) for fingerprints of one space and lookup, int64, same shape."""
    return torch.remainder(mix(prints, seed_of(space, lookup)), rows)


def _shift(h: Tensor, bits: int, out: Tensor) -> Tensor:
    """Logical right shift of int64, into `out`."""
    return torch.bitwise_right_shift(h, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
