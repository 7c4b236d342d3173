"""What a frozen model reads of the catalogue's items, made once when a bundle is loaded.

A request then takes rows of it: no features of items to encode, no ids to place in tables, nothing to pool. The vectors
are those that the model would make, so scores are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.batch import keyed_jagged
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder, Values
from engine.model import RankingModel, pool
from engine.schema import FeatureSpec

_CHUNK = 8192
_BYTES_AN_ID = 160
"""Of an id's text and its place in a dictionary, about."""
_RECENT = 8192
"""Values of the request's features whose vectors are kept."""


class ItemSide:
    """Vectors of items by catalogue row: the pooled fields, the dense features, what a history reads of them."""

    def __init__(self, model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue) -> None:
        """Computes all of the catalogue. model: frozen, with its weights; its sequences are all of one length."""
        self.model, self.encoder, self.catalogue = model, encoder, catalogue
        self._items = [f for f in model.fields if not f.from_request]
        self._request = [f for f in model.fields if f.from_request]
        self._recent: dict[tuple[str, bytes], Tensor] = {}
        self._rows = dict(zip(catalogue.ids(np.arange(len(catalogue))), range(len(catalogue)), strict=True))
        self._longest = max((s.max_length for s in model.sequences), default=0)
        starts = range(0, len(catalogue), _CHUNK)
        with torch.inference_mode():
            chunks = [
                _made(model, encoder, catalogue, np.arange(start, min(start + _CHUNK, len(catalogue))))
                for start in starts
            ]
            columns = {name: torch.cat([vectors[name] for vectors, _ in chunks]) for name in chunks[0][0]}
            self._dense = torch.cat([dense for _, dense in chunks])
            del chunks
            shared = {  # features of one space read one table, so that this is the usual case
                s.name: s.of for s in model.sequences if torch.equal(columns[s.name], columns[s.of])
            }
            names = [name for name in columns if name not in shared]
            self._vectors = torch.cat([columns[name] for name in names], dim=1)
        ends = np.cumsum([columns[name].shape[1] for name in names]).tolist()
        self._place = {name: slice(end - columns[name].shape[1], end) for name, end in zip(names, ends, strict=True)}
        self._place.update({name: self._place[of] for name, of in shared.items()})

    @classmethod
    def make(
        cls, model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue, most_bytes: int
    ) -> ItemSide | None:
        """None where it would be larger than `most_bytes`, or where the model's sequences differ in length."""
        if not len(catalogue) or len({s.max_length for s in model.sequences}) > 1 or encoder.schema.item is None:
            return None
        with torch.inference_mode():
            vectors, dense = _made(model, encoder, catalogue, np.zeros(1, dtype=np.int64))
        an_item = sum(v.nbytes for v in vectors.values()) + dense.nbytes + _BYTES_AN_ID
        return cls(model, encoder, catalogue) if len(catalogue) * an_item <= most_bytes else None

    @property
    def nbytes(self) -> int:
        """What is held."""
        return self._vectors.nbytes + self._dense.nbytes

    def logits(self, request: ScoreRequest) -> dict[str, Tensor] | None:
        """task -> logits float32 [N]; None for a request that the catalogue alone does not answer: items or history
        that it does not know, features given with the request, sequences given by name."""
        item = self.encoder.schema.item
        if request.item_features or any(name != item for name in request.history) or not request.items:
            return None
        n = len(request.items)
        past = request.history.get(item, ())[: self._longest] if item else ()
        try:
            rows = [*map(self._rows.__getitem__, request.items), *map(self._rows.__getitem__, past)]
        except (KeyError, TypeError):
            return None
        with torch.inference_mode():
            read = torch.from_numpy(np.array(rows, dtype=np.int64))
            vectors = self._vectors.index_select(0, read)
            ids, numbers = self.encoder.parted(self.encoder.encode_user(request))
            pooled = {f.name: row.expand(n, -1) for f, row in zip(self._request, self._of_request(ids), strict=True)}
            pooled.update({f.name: vectors[:n, self._place[f.name]] for f in self._items})
            dense_user = self.encoder.dense(numbers, of_items=False, rows=1)
            dense = torch.cat([dense_user.expand(n, -1), self._dense.index_select(0, read[:n])], dim=1)
            return self.model.rank(
                pooled, dense, self._attended(pooled, vectors[n:]), torch.zeros(n, dtype=torch.int64)
            )

    def _of_request(self, ids: Mapping[str, Values]) -> list[Tensor]:
        """Vectors [1, width] of the request's features. Those of recent values are kept: hours, users who stay."""
        recent = self._recent
        keys = [(f.name, ids[f.name][0].tobytes()) for f in self._request]
        new = [f for f, key in zip(self._request, keys, strict=True) if key not in recent]
        if new:
            if len(recent) > _RECENT:
                recent, new = {}, self._request
                self._recent = recent  # other threads go on with the one before
            made = _embedded(self.model, ids, new)
            recent.update({(f.name, ids[f.name][0].tobytes()): made[f.name].clone() for f in new})
        return [recent[key] for key in keys]

    def _attended(self, pooled: dict[str, Tensor], past: Tensor) -> tuple[Tensor, JaggedTensor] | None:
        """The targets' vectors and the history's, as the interest model reads them."""
        sequences = self.model.sequences
        if not sequences:
            return None
        targets = [pooled[s.of] for s in sequences]
        values = [past[:, self._place[s.name]] for s in sequences]
        one = len(sequences) == 1
        history = values[0] if one else torch.cat(values, dim=1)
        lengths = torch.tensor([len(history)])
        return targets[0] if one else torch.cat(targets, dim=1), JaggedTensor(values=history, lengths=lengths)


def _made(
    model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray
) -> tuple[dict[str, Tensor], Tensor]:
    """Catalogue rows int64 [n] -> (item feature or sequence -> float32 [n, width], dense float32 [n, m])."""
    ids, numbers = encoder.parted(encoder.encode_items(catalogue, rows))
    ids.update({s.name: ids[s.of] for s in model.sequences})
    found = _embedded(model, ids, [*(f for f in model.fields if not f.from_request), *model.sequences])
    return found, encoder.dense(numbers, of_items=True, rows=len(rows))


def _embedded(model: RankingModel, ids: Mapping[str, Values], features: Sequence[FeatureSpec]) -> dict[str, Tensor]:
    """feature -> one vector a row. A sequence has one value a row here."""
    if not features:
        return {}
    look_up = getattr(model.embedding, "look_up", None)
    if look_up is None or any(ids[f.name][1] is not None for f in features):
        found = model.embedding(keyed_jagged({f.name: ids[f.name] for f in features}))
        return {f.name: found[f.name].values() if f.kind == "sequence" else pool(f, found[f.name]) for f in features}
    vectors: dict[str, Tensor] = look_up({f.name: torch.from_numpy(ids[f.name][0]) for f in features})
    return vectors  # one value a row: nothing to pool, and nothing ragged to make
