"""The retrieval model: users and items into one space, from the same features and the same kind of embedding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.batch import Batch, keyed_jagged
from engine.components import EmbeddingMethod, Encoder, Inputs, InputSpec
from engine.config import Config, RetrievalConfig
from engine.errors import SchemaError
from engine.model import make_embedding, mean_pool
from engine.plugins import Plugins
from engine.schema import FeatureSpec, Schema
from engine.tables import unallocated_tables

if TYPE_CHECKING:
    from engine.catalogue import ArrowCatalogue
    from engine.data.encoder import FeatureEncoder, Values
    from engine.data.statistics import IdStatistics


class EncoderModel(nn.Module):
    """Embeds a batch's users and items.

    The user's side reads the features of the user and the context, and the mean of each sequence; the item's side the
    features of the item. `normalize` makes vectors of length one.
    """

    def __init__(self, schema: Schema, embedding: nn.Module, encoder: Encoder, *, normalize: bool) -> None:
        super().__init__()
        self.schema = schema
        self.embedding = embedding
        self.encoder = encoder
        self.normalize = normalize
        self._user = [f for f in schema.embedded if f.from_request]
        self._item = [f for f in schema.embedded if not f.from_request]

    @property
    def output_dim(self) -> int:
        return self.encoder.output_dim

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Users [U, D] and items [N, D] (or [N, V, D]) with one lookup of all ids."""
        vectors = self.embedding(batch.ids)
        return self._users(vectors, batch.dense_user), self._items(vectors, batch.dense_item)

    def users(self, batch: Batch) -> Tensor:
        """-> [U, D]; the item's features are not read."""
        return self._users(self.embedding(_only(batch.ids, self._user)), batch.dense_user)

    def items(self, batch: Batch) -> Tensor:
        """-> [N, D] or [N, V, D]; the user's features are not read."""
        return self._items(self.embedding(_only(batch.ids, self._item)), batch.dense_item)

    def _users(self, vectors: Mapping[str, JaggedTensor], dense: Tensor) -> Tensor:
        return self._scaled(self.encoder.users(_inputs(self._user, vectors, dense)))

    def _items(self, vectors: Mapping[str, JaggedTensor], dense: Tensor) -> Tensor:
        return self._scaled(self.encoder.items(_inputs(self._item, vectors, dense)))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def freeze(self) -> EncoderModel:
        """The form that is stored and served: plain tensors, no gradients."""
        embedding = self.embedding.freeze() if isinstance(self.embedding, EmbeddingMethod) else self.embedding
        frozen = EncoderModel(self.schema, embedding, copy.deepcopy(self.encoder), normalize=self.normalize)
        return frozen.eval().requires_grad_(False)


def similarity(users: Tensor, items: Tensor) -> Tensor:
    """Inner products of users [U, D] with items [M, D], or the best of an item's vectors [M, V, D] -> [U, M]."""
    if items.ndim == 2:
        return users @ items.T
    return torch.einsum("ud,mvd->umv", users, items).amax(dim=2)


def build_encoder_model(
    config: Config,
    statistics: Mapping[str, IdStatistics],
    plugins: Plugins,
    *,
    frozen: bool = False,
    device: torch.device | str | None = None,
) -> EncoderModel:
    """The encoder that a configuration's `retrieval` section describes; its first weights follow from `config.seed`.

    frozen, and device "meta": as for `engine.model.build_model`.
    """
    section = retrieval_section(config)
    where = None if device is None else torch.device(device)
    meta = where is not None and where.type == "meta"
    schema = config.schema_()
    torch.manual_seed(config.seed)
    with unallocated_tables() if meta else nullcontext(), torch.device("meta") if meta else nullcontext():
        embedding = make_embedding(config, schema.embedded, statistics, plugins)
        method = plugins.get("encoders", section.encoder.name)
        user = _spec(schema, embedding.widths, request=True)
        item = _spec(schema, embedding.widths, request=False)
        encoder = method(user, item, method.Options(**section.encoder.options))
        model = EncoderModel(schema, embedding, encoder, normalize=section.normalize)
    model = model.freeze() if frozen else model
    return model if where is None or meta else model.to(where)


def retrieval_section(config: Config) -> RetrievalConfig:
    """The configuration's `retrieval`; SchemaError where it is left out."""
    if config.retrieval is None:
        raise SchemaError(f"configuration '{config.name}' has no section `retrieval`; add one to find candidates")
    return config.retrieval


def item_columns(
    encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray
) -> tuple[dict[str, Values], dict[str, np.ndarray]]:
    """The item's features of catalogue rows int64 [n] -> ids and numbers by feature name, as `assemble` takes them.

    A feature that the catalogue does not hold (it comes with each impression) reads as missing.
    """
    ids: dict[str, Values] = {}
    numbers: dict[str, np.ndarray] = {}
    for feature in encoder.schema.of_item():
        known = catalogue.encoded.get(feature.name)
        if known is not None:
            values = known.take(rows)
        elif feature.kind == "categorical" and feature.column == encoder.schema.item:
            values = (catalogue.prints[rows], None)
        else:
            missing = encoder.encode_values(feature.name, [None]).with_neutral(encoder.neutral(feature))
            values = missing.take(np.zeros(len(rows), dtype=np.int64))
        if feature.is_dense:
            numbers[feature.name] = values[0]
        else:
            ids[feature.name] = values
    return ids, numbers


def item_batch(encoder: FeatureEncoder, catalogue: ArrowCatalogue, rows: np.ndarray) -> Batch:
    """Catalogue rows int64 [n] as the N targets of a batch without users: what `EncoderModel.items` reads."""
    ids, numbers = item_columns(encoder, catalogue, rows)
    dense = [numbers[f.name] for f in encoder.schema.dense if not f.from_request]
    return Batch(
        ids=keyed_jagged(ids),
        dense_user=torch.empty(0, sum(f.from_request for f in encoder.schema.dense)),
        dense_item=torch.from_numpy(np.stack(dense, axis=1)) if dense else torch.empty(len(rows), 0),
        user_of_target=torch.zeros(len(rows), dtype=torch.int64),
    )


def _only(ids: KeyedJaggedTensor, features: Sequence[FeatureSpec]) -> KeyedJaggedTensor:
    """The keys of these features."""
    if len(ids.keys()) == len(features):
        return ids
    parts = ids.to_dict()
    return keyed_jagged({f.name: (parts[f.name].values(), parts[f.name].lengths()) for f in features})


def _inputs(features: Sequence[FeatureSpec], vectors: Mapping[str, JaggedTensor], dense: Tensor) -> Inputs:
    """One vector a row and feature: the value's own, or the mean of several."""
    fields = {f.name: mean_pool(vectors[f.name]) if f.is_jagged else vectors[f.name].values() for f in features}
    return Inputs(fields=fields, dense=dense)


def _spec(schema: Schema, widths: Mapping[str, int], *, request: bool) -> InputSpec:
    fields = {f.name: widths[f.name] for f in schema.embedded if f.from_request == request}
    dense = sum(f.from_request == request for f in schema.dense)
    if not fields and not dense:
        side = "user or context feature, nor a sequence" if request else "item feature"
        raise SchemaError(f"retrieval has nothing to read: the configuration has no {side}")
    return InputSpec(fields=fields, dense=dense, from_request=frozenset(fields) if request else frozenset())
