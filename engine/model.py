"""The ranking model: ids -> vectors -> pooled fields and the interest -> ranker -> a logit a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.batch import Batch, keyed_jagged
from engine.components import EmbeddingMethod, Inputs, InputSpec, InterestModel, Ranker
from engine.config import Config
from engine.errors import SchemaError
from engine.plugins import Plugins
from engine.schema import FeatureSpec, Schema
from engine.tables import unallocated_tables

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics

INTEREST = "interest"
"""Name of the field that the interest model fills."""


class RankingModel(nn.Module):
    """Scores the targets of a batch.

    Features of the user and the context are looked up and pooled once a request and repeated for its targets. All
    sequences together (aligned, their vectors behind one another, as are those of the target features they are `of`)
    feed one interest model.
    """

    def __init__(
        self,
        schema: Schema,
        embedding: nn.Module,
        interest: InterestModel | None,
        ranker: Ranker,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embedding = embedding
        self.interest = interest
        self.ranker = ranker
        self._fields = [f for f in schema.embedded if f.kind != "sequence"]
        self._sequences = schema.sequences if interest is not None else []
        self._keys = [f.name for f in (schema.embedded if self._sequences else self._fields)]

    @property
    def fields(self) -> list[FeatureSpec]:
        """Features that the ranker reads as fields."""
        return self._fields

    @property
    def sequences(self) -> list[FeatureSpec]:
        """Features that the interest model reads."""
        return self._sequences

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> task -> logits float32 [N]."""
        return self.score(batch, self.embed(batch))

    def embed(self, batch: Batch) -> dict[str, JaggedTensor]:
        """feature -> one vector a value. The regularisation of a training step reads these."""
        return self.embedding(_select(batch.ids, self._keys))

    def score(self, batch: Batch, embedded: Mapping[str, JaggedTensor]) -> dict[str, Tensor]:
        """The rest of `forward`, from the vectors of `embed`."""
        pooled = {f.name: pool(f, embedded[f.name]) for f in self._fields}
        repeat = _Repeat(batch)
        requested = [f.name for f in self._fields if f.from_request]
        pooled.update(repeat({name: pooled[name] for name in requested}))
        dense = [repeat.one(batch.dense_user)] if batch.dense_user.shape[1] else []
        dense += [batch.dense_item] if batch.dense_item.shape[1] else []
        columns = torch.cat(dense, dim=1) if dense else batch.dense_item.new_zeros(batch.targets, 0)
        attended = self._attended(pooled, embedded) if self.interest is not None else None
        return self.rank(pooled, columns, attended, batch.user_of_target)

    def rank(
        self,
        pooled: Mapping[str, Tensor],
        dense: Tensor,
        attended: tuple[Tensor, JaggedTensor] | None,
        user_of_target: Tensor,
    ) -> dict[str, Tensor]:
        """The end of `score`: one vector a field and target, dense [N, n + m], and what the interest model reads."""
        fields = {f.name: pooled[f.name] for f in self._fields}
        if self.interest is not None:
            assert attended is not None
            fields[INTEREST] = self.interest(*attended, user_of_target)
        return self.ranker(Inputs(fields=fields, dense=dense))

    def explain(self, batch: Batch) -> dict[str, JaggedTensor]:
        """sequence feature -> the weight of each history item for each target: values [P, 1] over N targets."""
        if self.interest is None:
            return {}
        embedded = self.embed(batch)
        pooled = {s.of: pool(self.schema[s.of], embedded[s.of]) for s in self._sequences}
        targets, history = self._attended(pooled, embedded)
        weights = self.interest.explain(targets, history, batch.user_of_target)
        return {s.name: weights for s in self._sequences}

    def _attended(
        self, pooled: Mapping[str, Tensor], embedded: Mapping[str, JaggedTensor]
    ) -> tuple[Tensor, JaggedTensor]:
        """The targets' vectors [N, D] and the histories' [T, D]."""
        parts = [embedded[s.name] for s in self._sequences]
        if len(parts) == 1:
            return pooled[self._sequences[0].of], parts[0]
        if len({len(p.values()) for p in parts}) > 1:
            raise SchemaError(
                f"sequences {', '.join(s.name for s in self._sequences)} differ in length; they must be aligned"
            )
        history = JaggedTensor(
            values=torch.cat([p.values() for p in parts], dim=1), lengths=parts[0].lengths(), offsets=parts[0].offsets()
        )
        return torch.cat([pooled[s.of] for s in self._sequences], dim=1), history

    def settle(self) -> None:
        """To serve: the weights do not change any more, so that parts may keep what follows from them alone."""
        settle = getattr(self.interest, "settle", None)
        if settle is not None:
            settle()

    @torch.no_grad()
    def freeze(self) -> RankingModel:
        """The form that is stored and served: plain tensors, no TorchRec, no gradients. Tables may share memory with
        this model; the rest is copied."""
        embedding = self.embedding.freeze() if isinstance(self.embedding, EmbeddingMethod) else self.embedding
        frozen = RankingModel(self.schema, embedding, copy.deepcopy(self.interest), copy.deepcopy(self.ranker))
        return frozen.eval().requires_grad_(False)


def _select(ids: KeyedJaggedTensor, keys: list[str]) -> KeyedJaggedTensor:
    """Only these keys of a batch: its other features (histories that no interest model reads) are not embedded."""
    if ids.keys() == keys:
        return ids
    values = dict(zip(ids.keys(), ids.values().split(ids.length_per_key()), strict=True))
    lengths = dict(zip(ids.keys(), ids.lengths().split(ids.stride_per_key()), strict=True))
    return keyed_jagged({key: (values[key], lengths[key]) for key in keys})


class _Repeat:
    """Rows of U requests to rows of N targets."""

    def __init__(self, batch: Batch) -> None:
        self.users, self.targets = batch.users, batch.targets
        self.of_target = batch.user_of_target
        self.same = self.users == self.targets and bool(
            torch.equal(self.of_target, torch.arange(self.targets, device=self.of_target.device))
        )

    def one(self, rows: Tensor) -> Tensor:
        if self.same:
            return rows
        return rows.expand(self.targets, -1) if self.users == 1 else rows.index_select(0, self.of_target)

    def __call__(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.same or not fields:
            return fields
        widths = [v.shape[1] for v in fields.values()]
        repeated = self.one(torch.cat(list(fields.values()), dim=1))
        return dict(zip(fields, repeated.split(widths, dim=1), strict=True))


def pool(feature: FeatureSpec, vectors: JaggedTensor) -> Tensor:
    """One vector a row: the value's own, or the mean of several (zeros where there is none)."""
    return mean_pool(vectors) if feature.is_jagged else vectors.values()


def mean_pool(vectors: JaggedTensor) -> Tensor:
    """values [T, D] over n rows -> their means [n, D]; zeros for a row without values."""
    lengths = vectors.lengths().to(torch.int64)
    values = vectors.values()
    rows = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths, output_size=len(values))
    sums = values.new_zeros(len(lengths), values.shape[1]).index_add(0, rows, values)
    return sums / lengths.clamp(min=1).to(values.dtype)[:, None]


def build_model(
    config: Config,
    statistics: Mapping[str, IdStatistics],
    plugins: Plugins,
    *,
    frozen: bool = False,
    device: torch.device | str | None = None,
) -> RankingModel:
    """The model that a configuration describes; its first weights follow from `config.seed`.

    frozen: the form for inference, whose `state_dict` a bundle holds. On device "meta" it takes no memory:
    `load_state_dict(tensors, assign=True)` then makes mapped files its weights.
    """
    where = None if device is None else torch.device(device)
    meta = where is not None and where.type == "meta"
    schema = config.schema_()
    sequences = _checked_sequences(schema)
    interested = config.interest is not None and bool(sequences)
    features = [f for f in schema.embedded if f.kind != "sequence" or interested]
    torch.manual_seed(config.seed)
    with unallocated_tables() if meta else nullcontext(), torch.device("meta") if meta else nullcontext():
        embedding = make_embedding(config, features, statistics, plugins)
        widths = {f.name: embedding.widths[f.name] for f in features if f.kind != "sequence"}
        request = {f.name for f in features if f.from_request and f.name in widths}
        interest = None
        if config.interest is not None and sequences:
            method = plugins.get("interests", config.interest.name)
            dim = sum(embedding.widths[s.of] for s in sequences)
            interest = method(dim, method.Options(**config.interest.options))
            widths[INTEREST] = interest.output_dim
        network = plugins.get("rankers", config.ranker.name)
        spec = InputSpec(fields=widths, dense=len(schema.dense), from_request=frozenset(request))
        ranker = network(spec, schema.tasks, network.Options(**config.ranker.options))
        model = RankingModel(schema, embedding, interest, ranker)
    model = model.freeze() if frozen else model
    return model if where is None or meta else model.to(where)


def make_embedding(
    config: Config, features: list[FeatureSpec], statistics: Mapping[str, IdStatistics], plugins: Plugins
) -> EmbeddingMethod:
    """The configuration's embedding method over these features."""
    method = plugins.get("embeddings", config.embedding.name)
    options = method.Options(**config.embedding.options)
    if method.wants_statistics(options):
        missing = sorted({f.space for f in features} - set(statistics))
        if missing:
            raise SchemaError(
                f"embedding '{method.name}' needs statistics of {', '.join(missing)}, which are not there"
            )
    return method(features, options, statistics)


def _checked_sequences(schema: Schema) -> list[FeatureSpec]:
    """The sequences, each of which must list past values of a single-valued item feature of the same width."""
    by_name = {f.name: f for f in schema.features}
    for sequence in schema.sequences:
        target = by_name.get(sequence.of)
        if target is None:
            raise SchemaError(f"feature '{sequence.name}': `of` must name an item feature, not '{sequence.of}'")
        if target.side != "item" or target.is_jagged or target.is_dense:
            raise SchemaError(
                f"feature '{sequence.name}': `of` names '{target.name}', which is {target.kind} on the {target.side}'s "
                "side; it must be a single-valued item feature"
            )
        if target.space != sequence.space:
            raise SchemaError(f"feature '{sequence.name}' and '{target.name}' must share a space")
    return schema.sequences
