"""How large an Arrow IPC stream becomes once it is read, found without reading it: its buffers may be compressed.

Source: the Arrow columnar format, "Serialization and Interprocess Communication", Message.fbs; FlatBuffers' own layout
(a table begins with the distance back to its vtable, which holds where each field lies).
"""

from __future__ import annotations

import struct

import pyarrow as pa

_HEADER_TYPE, _HEADER = 1, 2  # fields of a Message
_LENGTH, _BUFFERS, _COMPRESSION = 0, 2, 3  # fields of a RecordBatch
_DATA = 1  # field of a DictionaryBatch
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # values of Message.header_type


def inflated_size(stream: bytes) -> tuple[int, int]:
    """(bytes of all buffers once they are decompressed, rows of all batches).

    ValueError, struct.error or an Arrow error where this is no stream.
    """
    size = rows = 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(stream)):
        meta = message.metadata.to_pybytes()
        root = _offset(meta, 0)
        kind = _field(meta, root, _HEADER_TYPE)
        header = _field(meta, root, _HEADER)
        if kind is None or header is None or meta[kind] not in (_DICTIONARY_BATCH, _RECORD_BATCH):
            continue
        batch = _offset(meta, header)
        if meta[kind] == _DICTIONARY_BATCH:
            data = _field(meta, batch, _DATA)
            if data is None:
                raise ValueError("a dictionary without data")
            batch = _offset(meta, data)
        length = _field(meta, batch, _LENGTH)
        count = 0 if length is None else struct.unpack_from("<q", meta, length)[0]
        if count < 0:
            raise ValueError("a batch of a negative number of rows")
        rows += count
        size += _batch(meta, batch, memoryview(message.body if message.body is not None else b""))
    return size, rows


def _batch(meta: bytes, batch: int, body: memoryview) -> int:
    place = _field(meta, batch, _BUFFERS)
    if place is None:
        return 0
    vector = _offset(meta, place)
    (count,) = struct.unpack_from("<I", meta, vector)
    if vector + 4 + 16 * count > len(meta):
        raise ValueError("more buffers than the message holds")
    compressed = _field(meta, batch, _COMPRESSION) is not None
    total = 0
    for n in range(count):
        offset, length = struct.unpack_from("<qq", meta, vector + 4 + 16 * n)
        inflated = length
        if compressed and length >= 8:
            (said,) = struct.unpack_from("<q", body, offset)
            inflated = length - 8 if said == -1 else said  # -1: left as it was
        if inflated < 0 or offset < 0:
            raise ValueError("a buffer of a negative size")
        total += inflated
    return total


def _field(meta: bytes, table: int, number: int) -> int | None:
    """Where a table's field lies; None where it has its default."""
    vtable = table - struct.unpack_from("<i", meta, table)[0]
    entry = 4 + 2 * number
    if vtable < 0 or entry + 2 > struct.unpack_from("<H", meta, vtable)[0]:
        return None
    (offset,) = struct.unpack_from("<H", meta, vtable + entry)
    return table + offset if offset else None


def _offset(meta: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", meta, place)[0])
