"""The bundle as this side of Triton knows it: how requests are told, and which items read otherwise over there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from engine.bundle import Bundle
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.hashing import fingerprints
from engine.inference.signature import CANDIDATES, LENGTHS, Signature
from engine.inference.tensors import encode, of_items
from engine.streaming.deltas.apply import Chain
from plugins.scorers.triton_breaker import Breaker

_PROBED = 100
"""Items of the probe."""


@dataclass(frozen=True)
class Loaded:
    """Replaced as one, never changed, but for the breaker, which all that follow from one bundle share.

    catalogue: the bundle's, or one that has grown from it; then `changed` bool [items + 1] says of each row whether it
    reads otherwise than in the bundle (the last row, of unknown items, does not).
    """

    bundle: Bundle
    breaker: Breaker
    chain: Chain
    catalogue: ArrowCatalogue
    changed: np.ndarray | None = None

    @classmethod
    def of(cls, bundle: Bundle, failures: int) -> Self:
        return cls(bundle, Breaker(failures), Chain(bundle.name, bundle.version), bundle.catalogue)

    @property
    def base(self) -> str:
        return self.bundle.version

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.bundle.schema.tasks

    @cached_property
    def signature(self) -> Signature:
        return Signature.of(self.bundle.schema)

    @cached_property
    def probe(self) -> ScoreRequest:
        """A request of real items."""
        items = self.bundle.catalogue.ids(np.arange(min(_PROBED, len(self.bundle.catalogue)))) or ["item"]
        item = self.bundle.schema.item
        return ScoreRequest(user={}, history={item: items[:50]} if item else {}, items=items)

    def told(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """As tensors. Where an item is new or was changed since the bundle, all items' features go along. SchemaError
        for a value that cannot be read."""
        apart = self.changed is not None and self._read_otherwise(fingerprints(request.items))
        return encode(request, self.bundle.encoder, self.catalogue, items_apart=apart)

    def whole(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Likewise of a request that comes as tensors: with the features that it leaves to the catalogue."""
        prints = tensors[CANDIDATES]
        if not self._read_otherwise(prints):
            return tensors
        given = {name.removesuffix(LENGTHS) for name in tensors}
        return {**of_items(self.bundle.encoder, self.catalogue, prints, given), **tensors}

    def _read_otherwise(self, prints: np.ndarray) -> bool:
        """Whether one of these items is new or was changed since the bundle."""
        return self.changed is not None and bool(self.changed[self.catalogue.rows_of(prints)].any())

    def few(self) -> dict[str, np.ndarray]:
        """The least that any model of ours answers: one candidate."""
        return {CANDIDATES: fingerprints(self.probe.items[:1])}

    def again(self, before: Self) -> Self:
        """The same bundle as before, read again: its place in Triton and what was said of items stay."""
        grown = before.changed is not None
        catalogue = before.catalogue if grown else self.catalogue
        return replace(self, breaker=before.breaker, catalogue=catalogue, changed=before.changed)

    def grown(self, catalogue: ArrowCatalogue, rows: np.ndarray | None) -> Self:
        """Over a catalogue that has grown; as `Scorer.items_changed`."""
        changed = np.zeros(len(catalogue) + 1, dtype=bool)
        changed[len(self.bundle.catalogue) : -1] = True
        if rows is None or self.changed is None:
            for overlay in catalogue.changed.values():
                changed[overlay.rows] = True
        else:
            changed[: len(self.changed) - 1] |= self.changed[:-1]
            changed[rows] = True
        return replace(self, catalogue=catalogue, changed=changed)
