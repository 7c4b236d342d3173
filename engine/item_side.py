"""What a frozen model reads of the catalogue's items, made once when a bundle is loaded, renewed where it changes.

A request then takes rows of it: no features of items to encode, no ids to place in tables, nothing to pool. The vectors
are those that the model would make, so scores are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.batch import keyed_jagged
from engine.catalogue import ArrowCatalogue
from engine.components import ScoreRequest
from engine.data.encoder import FeatureEncoder, Values
from engine.item_readers import ItemReaders, Pairs
from engine.model import RankingModel, pool
from engine.recent import RecentVectors
from engine.schema import FeatureSpec
from engine.streaming.deltas.apply import chunks
from engine.streaming.deltas.delta import TableRows
from engine.tables import FrozenTables

_CHUNK = 8192
_BYTES_AN_ID = 160
"""Of an id's text and its place in a dictionary, about."""


@dataclass(frozen=True)
class HeldItems:
    """The memory of an `ItemSide`, by catalogue row; it may be mapped from a file that another process writes.

    vectors float32 [items, sum of the widths]: the columns of features and sequences behind one another.
    dense float32 [items, m]. widths: feature or sequence -> its columns, in order.
    shared: sequence -> the item feature whose columns it reads.
    """

    vectors: Tensor
    dense: Tensor
    widths: Mapping[str, int]
    shared: Mapping[str, str]

    @classmethod
    def made(cls, model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue) -> Self:
        """Of all of the catalogue, in memory of its own."""
        with torch.inference_mode():
            parts = [_made(model, encoder, catalogue, rows) for rows in _in_chunks(np.arange(len(catalogue)))]
            columns = {name: torch.cat([vectors[name] for vectors, _ in parts]) for name in parts[0][0]}
            dense = torch.cat([dense for _, dense in parts])
            del parts
            shared = {s.name: s.of for s in model.sequences if _same(model, s, columns)}
            widths = {name: column.shape[1] for name, column in columns.items() if name not in shared}
            return cls(torch.cat([columns[name] for name in widths], dim=1), dense, widths, shared)


class _RowsOfIds:
    """id -> catalogue row, made when it is first asked for: who gives fingerprints has no need of texts."""

    def __init__(self, catalogue: ArrowCatalogue, known: dict[str, int] | None = None) -> None:
        self._catalogue, self._known = catalogue, known

    def all(self) -> dict[str, int]:
        known = self._known
        if known is None:
            every = np.arange(len(self._catalogue))
            known = self._known = dict(zip(self._catalogue.ids(every), every.tolist(), strict=True))
        return known

    def copy(self) -> _RowsOfIds:
        return _RowsOfIds(self._catalogue, dict(self.all()))


class ItemSide:
    """Vectors of items by catalogue row: the pooled fields, the dense features, what a history reads of them.

    What changes gives another side, which shares the vectors with the one before: those that changed are written in
    place, new items behind the last. A request that began with the one before ends with it. One writer at a time.
    """

    def __init__(
        self,
        model: RankingModel,
        encoder: FeatureEncoder,
        catalogue: ArrowCatalogue,
        most_bytes: int | None = None,
        held: HeldItems | None = None,
    ) -> None:
        """model: frozen, with its weights; its sequences are all of one length.

        held: what the model makes of the catalogue, where it is there already; all of it is computed where it is not.
        """
        self.model, self.encoder, self.catalogue, self.most_bytes = model, encoder, catalogue, most_bytes
        self._items = [f for f in model.fields if not f.from_request]
        self._request = [f for f in model.fields if f.from_request]
        self._recent = RecentVectors()
        self._readers: dict[str, ItemReaders] | None = None
        self._rows = _RowsOfIds(catalogue)
        self._longest = max((s.max_length for s in model.sequences), default=0)
        held = HeldItems.made(model, encoder, catalogue) if held is None else held
        self._vectors, self._dense, self._names = held.vectors, held.dense, list(held.widths)
        self._widths, self._shared = held.widths, held.shared
        ends = np.cumsum(list(held.widths.values())).tolist()
        self._place = {n: slice(end - held.widths[n], end) for n, end in zip(self._names, ends, strict=True)}
        self._place.update({name: self._place[of] for name, of in held.shared.items()})

    @classmethod
    def make(
        cls, model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue, most_bytes: int
    ) -> Self | None:
        """None where it would be larger than `most_bytes`, or where the model's sequences differ in length."""
        if not len(catalogue) or len({s.max_length for s in model.sequences}) > 1 or encoder.schema.item is None:
            return None
        with torch.inference_mode():
            vectors, dense = _made(model, encoder, catalogue, np.zeros(1, dtype=np.int64))
        shared = [s.name for s in model.sequences if _same(model, s, vectors)]
        an_item = sum(v.nbytes for name, v in vectors.items() if name not in shared) + dense.nbytes + _BYTES_AN_ID
        return cls(model, encoder, catalogue, most_bytes) if len(catalogue) * an_item <= most_bytes else None

    @property
    def nbytes(self) -> int:
        """What is held."""
        return self._vectors.nbytes + self._dense.nbytes

    @property
    def held(self) -> HeldItems:
        """The memory that it reads."""
        return HeldItems(self._vectors, self._dense, self._widths, self._shared)

    # ---------------------------------------------------------------------------------------------- requests
    def logits(self, request: ScoreRequest) -> dict[str, Tensor] | None:
        """task -> logits float32 [N]; None for a request that the catalogue alone does not answer: items or history
        that it does not know, features given with the request, sequences given by name."""
        item = self.encoder.schema.item
        if request.item_features or any(name != item for name in request.history) or not request.items:
            return None
        n = len(request.items)
        past = request.history.get(item, ())[: self._longest] if item else ()
        try:
            row_of = self._rows.all().__getitem__
            rows = [*map(row_of, request.items), *map(row_of, past)]
        except (KeyError, TypeError):
            return None
        with torch.inference_mode():
            read = torch.from_numpy(np.array(rows, dtype=np.int64))
            before = self._vectors.index_select(0, read[n:])
            ids, numbers = self.encoder.parted(self.encoder.encode_user(request))
            history = {s.name: before[:, self._place[s.name]] for s in self.model.sequences}
            return self.rank(
                read[:n], ids, numbers, history, torch.tensor([len(before)]), torch.zeros(n, dtype=torch.int64)
            )

    def rank(
        self,
        rows: Tensor,
        ids: Mapping[str, Values],
        numbers: Mapping[str, np.ndarray],
        history: Mapping[str, Tensor],
        lengths: Tensor,
        user_of_target: Tensor,
    ) -> dict[str, Tensor]:
        """task -> logits float32 [N] of U requests at once; called in inference mode.

        rows int64 [N]: catalogue rows of the candidates, those of one request together; user_of_target int64 [N]: of
        which request. ids, numbers: the requests' features, U rows (`FeatureEncoder.parted`). history: sequence ->
        vectors [T, width] as `of_history` gives them, lengths int64 [U].
        """
        users, n = len(lengths), len(rows)
        vectors = self._vectors.index_select(0, rows)
        asked = self._of_request(ids) if users == 1 else _embedded(self.model, ids, self._request)
        dense_user = self.encoder.dense(numbers, of_items=False, rows=users)
        if users == 1:
            pooled = {name: row.expand(n, -1) for name, row in asked.items()}
            dense_user = dense_user.expand(n, -1)
        else:
            pooled = {name: several.index_select(0, user_of_target) for name, several in asked.items()}
            dense_user = dense_user.index_select(0, user_of_target)
        pooled.update({f.name: vectors[:, self._place[f.name]] for f in self._items})
        dense = torch.cat([dense_user, self._dense.index_select(0, rows)], dim=1)
        return self.model.rank(pooled, dense, self._attended(pooled, history, lengths), user_of_target)

    def of_history(self, sequence: FeatureSpec, prints: np.ndarray) -> Tensor:
        """Vectors [T, width] of a sequence's values, fingerprints int64 [T]: those that are here where all are items
        of the catalogue, else made."""
        if self.encoder.names_item(self.encoder.schema[sequence.of]):
            rows = self.catalogue.rows_of(prints)
            if (rows >= 0).all():
                return self._vectors.index_select(0, torch.from_numpy(rows))[:, self._place[sequence.name]]
        return _embedded(self.model, {sequence.name: (prints, None)}, [sequence])[sequence.name]

    def _of_request(self, ids: Mapping[str, Values]) -> dict[str, Tensor]:
        """Vectors [1, width] of one request's features. Those of recent values are kept: hours, users who stay."""
        found = self._recent.of(
            {f.name: ids[f.name][0] for f in self._request},
            lambda names: _embedded(self.model, ids, [f for f in self._request if f.name in names]),
        )
        return {f.name: vector for f, vector in zip(self._request, found, strict=True)}

    def _attended(
        self, pooled: dict[str, Tensor], history: Mapping[str, Tensor], lengths: Tensor
    ) -> tuple[Tensor, JaggedTensor] | None:
        """The targets' vectors and the histories', as the interest model reads them."""
        sequences = self.model.sequences
        if not sequences:
            return None
        targets, past = [pooled[s.of] for s in sequences], [history[s.name] for s in sequences]
        one = len(sequences) == 1
        values = past[0] if one else torch.cat(past, dim=1)
        return targets[0] if one else torch.cat(targets, dim=1), JaggedTensor(values=values, lengths=lengths)

    # ----------------------------------------------------------------------------------------------- changes
    def with_model(self, model: RankingModel) -> Self:
        """Over a model whose rest behind the tables is another."""
        if model.embedding is not self.model.embedding:
            return type(self)(model, self.encoder, self.catalogue, self.most_bytes)
        side = copy.copy(self)
        side.model = model
        return side

    def read_again(self, model: RankingModel) -> Self:
        """After another process renewed the vectors, which are mapped: over its model, no vector of a request kept."""
        side = copy.copy(self)
        side.model, side._recent = model, RecentVectors()
        return side

    def prepare(self) -> None:
        """Makes now what the first `renewed` would: which items read which rows. It takes the time of all items."""
        if self._readers is None and isinstance(self.model.embedding, FrozenTables):
            self._readers = self._all_readers()

    def renewed(self, changed: Mapping[str, TableRows], *, pause: bool = True) -> Self:
        """After rows of tables were written: the columns of the items that read them, and no vector of a request that
        was made of them. pause: as in `engine.streaming.deltas.apply.chunks`."""
        embedding = self.model.embedding
        if not isinstance(embedding, FrozenTables):
            return type(self)(self.model, self.encoder, self.catalogue, self.most_bytes)
        self.prepare()
        for name, readers in (self._readers or {}).items():
            part = changed.get(readers.table)
            if part is not None:
                self._renew(name, readers.reading(part.rows, len(self.catalogue)), pause=pause)
        side = copy.copy(self)
        side._recent = self._recent.without({n: p.rows for n, p in changed.items()}, embedding)
        return side

    def with_items(self, catalogue: ArrowCatalogue, rows: np.ndarray) -> Self | None:
        """Over a catalogue that has grown from this one's. rows int64 [m]: items that are new or read otherwise than
        before, distinct. None where it would be too large now."""
        each = self._vectors[:1].nbytes + self._dense[:1].nbytes + _BYTES_AN_ID
        if self.most_bytes is not None and len(catalogue) * each > self.most_bytes:
            return None
        if not isinstance(self.model.embedding, FrozenTables):
            return type(self)(self.model, self.encoder, catalogue, self.most_bytes)
        side, before = copy.copy(self), len(self.catalogue)
        side.catalogue = catalogue
        if len(catalogue) > len(self._vectors):
            room = len(catalogue) + len(catalogue) // 4
            side._vectors, side._dense = _roomier(self._vectors, room), _roomier(self._dense, room)
            side._rows = self._rows.copy()  # what holds the old vectors must not hear of rows beyond them
        for some in _in_chunks(rows):
            with torch.inference_mode():
                vectors, dense = _made(self.model, self.encoder, catalogue, some)
                at = torch.from_numpy(some)
                side._vectors.index_copy_(0, at, torch.cat([vectors[name] for name in self._names], dim=1))
                side._dense.index_copy_(0, at, dense)
        if self._readers is not None:
            side._readers = {n: r.with_more(*side._read_by(n, rows)) for n, r in self._readers.items()}
        new = np.arange(before, len(catalogue))
        side._rows.all().update(zip(catalogue.ids(new), new.tolist(), strict=True))
        return side

    def _renew(self, name: str, rows: np.ndarray, *, pause: bool) -> None:
        """One feature's columns of these items, in place."""
        feature = self.encoder.schema[name]
        columns = self._vectors[:, self._place[name]]
        for chunk in chunks(len(rows), pause=pause):
            some = rows[chunk]
            with torch.inference_mode():
                made = _embedded(self.model, _ids(self.encoder, self.catalogue, some, [feature]), [feature])
                columns.index_copy_(0, torch.from_numpy(some), made[name])

    def _all_readers(self) -> dict[str, ItemReaders]:
        """Of each feature that has columns of its own."""
        assert isinstance(self.model.embedding, FrozenTables)
        placements = self.model.embedding.placements
        every = np.arange(len(self.catalogue))
        return {
            name: ItemReaders.of(placements[name].table.name, [self._read_by(name, rows) for rows in _in_chunks(every)])
            for name in self._names
        }

    def _read_by(self, name: str, rows: np.ndarray) -> Pairs:
        """Rows of its table that a feature reads for these items."""
        assert isinstance(self.model.embedding, FrozenTables)
        values, lengths = _ids(self.encoder, self.catalogue, rows, [self.encoder.schema[name]])[name]
        placed = self.model.embedding.placer({name: torch.from_numpy(values)})[name].numpy()
        items = rows if lengths is None else np.repeat(rows, lengths)
        return placed, np.repeat(items, len(placed) // max(1, len(items)))


def _in_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]


def _roomier(rows: Tensor, room: int) -> Tensor:
    with torch.inference_mode():
        wider = torch.empty(room, rows.shape[1])
        wider[: len(rows)] = rows
        return wider


def _same(model: RankingModel, sequence: FeatureSpec, columns: Mapping[str, Tensor]) -> bool:
    """Whether a sequence reads what its item's feature reads: features of one space do, so that this is usual."""
    if not isinstance(model.embedding, FrozenTables):
        return torch.equal(columns[sequence.name], columns[sequence.of])
    placements = model.embedding.placements
    a, b = placements[sequence.name], placements[sequence.of]
    return a is b or (type(a), a.table, a.space, a.lookups) == (type(b), b.table, b.space, b.lookups)


def _made(
    model: RankingModel, encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray
) -> tuple[dict[str, Tensor], Tensor]:
    """Catalogue rows int64 [n] -> (item feature or sequence -> float32 [n, width], dense float32 [n, m])."""
    ids, numbers = encoder.parted(encoder.encode_items(catalogue, rows))
    ids.update({s.name: ids[s.of] for s in model.sequences})
    found = _embedded(model, ids, [*(f for f in model.fields if not f.from_request), *model.sequences])
    return found, encoder.dense(numbers, of_items=True, rows=len(rows))


def _ids(
    encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray, features: Sequence[FeatureSpec]
) -> dict[str, Values]:
    """Ids of some features, or of the items' feature that a sequence lists, for catalogue rows int64 [n]."""
    of = {f.name: f.of if f.kind == "sequence" else f.name for f in features}
    found, _ = encoder.parted(encoder.encode_items(catalogue, rows, list(of.values())))
    return {name: found[source] for name, source in of.items()}


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
