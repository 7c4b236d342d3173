"""Deltas from their parts, in whatever order the parts come."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta
from engine.streaming.deltas.delta_codec import MOST_PAYLOAD, Header, decode, read_part

REMEMBERED = 256


@dataclass
class _Incomplete:
    header: Header
    slices: dict[int, bytes] = field(default_factory=dict)
    held: int = 0


class Assembler:
    """`add` gives a delta once, with its last part; copies of parts change nothing.

    Holds at most `most` incomplete deltas of `most_bytes` together: the oldest gives way. One that is incomplete when
    it, or a later one of its chain, is complete is dropped. `dropped` counts both. To read a log again from an earlier
    position, take a new one: what was given is not given again.
    """

    def __init__(self, most: int = 4, most_bytes: int = MOST_PAYLOAD) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.dropped = 0
        self.size = 0  # bytes of the delta that `add` gave last
        self._incomplete: OrderedDict[tuple[object, ...], _Incomplete] = OrderedDict()
        self._given: OrderedDict[tuple[object, ...], None] = OrderedDict()

    @property
    def held(self) -> int:
        """Bytes of the parts that wait for others."""
        return sum(one.held for one in self._incomplete.values())

    def add(self, part: bytes) -> Delta | None:
        """BundleError names what is wrong with a part or with the whole; the parts of that delta are dropped."""
        header, piece = read_part(part)
        key = (*header.place, header.sha256)
        if key in self._given:
            return None
        one = self._incomplete.setdefault(key, _Incomplete(header))
        if (one.header.parts, one.header.bytes) != (header.parts, header.bytes):
            raise BundleError(f"{header.model} {header.version}: its parts are cut in different ways")
        if header.part not in one.slices:
            one.slices[header.part] = piece
            one.held += len(piece)
        if one.held > header.bytes:
            del self._incomplete[key]
            raise BundleError(f"{header.model} {header.version}: parts of more bytes than the whole")
        if len(one.slices) < header.parts:
            self._bound()
            return None
        del self._incomplete[key]
        delta = decode(header, b"".join(one.slices[n] for n in range(header.parts)))
        self.size = one.held
        self._remember(key)
        self._drop_older(header)
        return delta

    def _remember(self, key: tuple[object, ...]) -> None:
        self._given[key] = None
        while len(self._given) > REMEMBERED:
            self._given.popitem(last=False)

    def _drop_older(self, header: Header) -> None:
        for key, one in list(self._incomplete.items()):
            if one.header.place[:2] == header.place[:2] and one.header.place <= header.place:
                del self._incomplete[key]
                self.dropped += 1

    def _bound(self) -> None:
        while len(self._incomplete) > self.most or (self.held > self.most_bytes and len(self._incomplete) > 1):
            self._incomplete.popitem(last=False)
            self.dropped += 1
