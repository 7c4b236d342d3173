"""All that one bundle contributes to answers: catalogue, candidate sources, rerankers, the user's vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.appended import appended
from engine.bundle import Bundle
from engine.catalogue import ArrowCatalogue
from engine.components import (
    CandidateSource,
    PluginOptions,
    Reranker,
    Retriever,
    ScoreRequest,
    SourceContext,
    UserState,
)
from engine.config import ComponentConfig, ServingConfig
from engine.errors import BundleError, PlexrankError, PluginError, RequestError, SchemaError
from engine.plugins import Plugins
from engine.retrieval import EncoderModel, item_batch
from engine.schema import FeatureSpec, Schema
from engine.streaming.deltas.apply import check_fit
from engine.streaming.deltas.delta import Delta, ItemVectors
from engine.streaming.deltas.encoder_delta import with_part


@dataclass(frozen=True)
class Served:
    """Made once a bundle; requests that began with it end with it, also while another takes its place.

    sources: (name, candidates asked for, source) in the configuration's order. popular: catalogue rows by positives.
    config, plugins: what sources and rerankers are made of again when items change. learned bool [items]: whose vectors
    a learner gave; None where it gave none.
    """

    bundle: Bundle
    context: SourceContext
    sources: tuple[tuple[str, int, CandidateSource], ...]
    rerankers: tuple[tuple[str, Reranker], ...]
    popular: np.ndarray
    config: ServingConfig = field(default_factory=ServingConfig)
    plugins: Plugins | None = None
    learned: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path, config: ServingConfig | None, plugins: Plugins) -> Served:
        """Opens, verifies and assembles; BundleError or PluginError says what is not fit.

        config: the pipeline; by default the one in the bundle.
        """
        bundle = Bundle.open(path)
        try:
            bundle.check_parts()
            return cls.of(bundle, config or bundle.config.serving, plugins)
        except PlexrankError:
            raise
        except Exception as error:
            raise BundleError(f"{path}: cannot be served: {type(error).__name__}: {error}") from error

    @classmethod
    def of(cls, bundle: Bundle, config: ServingConfig, plugins: Plugins) -> Served:
        """The parts that the configuration names, over an open bundle."""
        tower = bundle.encoder_model(plugins)
        encode_user = None if tower is None else UserEncoder(bundle, tower, bundle.catalogue)
        context = SourceContext(
            catalogue=bundle.catalogue,
            counts=bundle.item_counts,
            latest=bundle.item_latest,
            retriever=_retriever(bundle, plugins),
            encode_user=encode_user,
            vectors=bundle.item_vectors,
        )
        return cls(bundle, context, (), (), _by_positives(context), config, plugins)._assembled()

    def _assembled(self) -> Served:
        """With sources and rerankers over the context; without plugins those that are there stay."""
        if self.plugins is None:
            return self
        sources = [(name, k, source.grown(self.context)) for name, k, source in self.sources] or [
            (use.name, use.k, component(self.plugins, "candidate_sources", use, self.context))
            for use in self.config.sources
        ]
        rerankers = [
            (use.name, component(self.plugins, "rerankers", use, self.context)) for use in self.config.rerankers
        ]
        return replace(self, sources=tuple(sources), rerankers=tuple(rerankers))

    @property
    def schema(self) -> Schema:
        return self.bundle.schema

    @property
    def catalogue(self) -> ArrowCatalogue:
        """The bundle's, or one that has grown from it."""
        assert isinstance(self.context.catalogue, ArrowCatalogue)
        return self.context.catalogue

    @property
    def tower(self) -> EncoderModel | None:
        """The retrieval encoder, where there is one: the bundle's, or what a learner made of it."""
        encode_user = self.context.encode_user
        return encode_user.tower if isinstance(encode_user, UserEncoder) else None

    # ------------------------------------------------------------------------------------------------ growth
    def with_items(self, ids: Sequence[str], features: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> Served:
        """One in which these items read otherwise, or are new (see `ArrowCatalogue.updated`); this one stays as it is.

        seconds: when each was said, the newest event of a new item. The retriever and the vectors are shared, and take
        what the encoder makes of the items, except where a learner gave a vector. SchemaError: a value cannot be read;
        ItemsRefused: the encoder makes no finite vector of some items. Nothing was changed then.
        """
        before, catalogue = self.catalogue, self.catalogue.updated(ids, features, self.bundle.encoder)
        new = len(catalogue) - len(before)
        rows = catalogue.rows(ids)
        came = np.zeros(new, np.int64)
        is_new = rows >= len(before)
        np.maximum.at(came, rows[is_new] - len(before), np.asarray(seconds, dtype=np.float64).astype(np.int64)[is_new])
        tower = self.tower
        context = replace(
            self.context,
            catalogue=catalogue,
            counts=appended(self.context.counts, np.zeros(new, np.int64)),
            latest=appended(self.context.latest, came),
            encode_user=None if tower is None else UserEncoder(self.bundle, tower, catalogue),
        )
        learned = None if self.learned is None else appended(self.learned, np.zeros(new, bool))
        if tower is not None and context.vectors is not None:
            read = np.unique(rows)
            read = read if learned is None else read[~learned[read]]
            vectors = _item_vectors(tower, self.bundle, catalogue, read)
            whole = np.isfinite(vectors).all(axis=1)
            if not whole.all():
                raise ItemsRefused("the encoder makes no finite vector of", catalogue.ids(read[~whole]))
            context.vectors = appended(context.vectors, np.zeros((new, vectors.shape[1]), np.float32))
            context.vectors[read] = vectors
            if context.retriever is not None and len(read):
                context.retriever.upsert(read, vectors)
        popular = appended(self.popular, np.arange(len(before), len(catalogue)))  # without a positive: last
        return replace(self, context=context, popular=popular, learned=learned)._assembled()

    def with_encoder(self, part: Delta) -> Served:
        """One whose encoder is what a learner made of it, and whose items have the vectors of the same delta.

        part: the encoder's (`engine.streaming.deltas.encoder_delta.apart`). Both are written in place, as in
        `with_vectors`. BundleError where it does not fit: nothing was changed.
        """
        tower, encode_user = self.check_encoder(part), self.context.encode_user
        assert isinstance(encode_user, UserEncoder)
        encode_user.tower = with_part(tower, part)
        return self if part.vectors is None else self.with_vectors(part.vectors)

    def check_encoder(self, part: Delta) -> EncoderModel:
        """The encoder that such a part of a delta fits; BundleError where it fits none."""
        tower = self.tower
        if tower is None:
            raise BundleError(f"{self.bundle.name} has no retrieval encoder, but delta {part.version} is of one")
        check_fit(tower, part)
        if part.vectors is not None:
            self._check_vectors(part.vectors)
        return tower

    def with_vectors(self, vectors: ItemVectors) -> Served:
        """One whose retriever and rerankers know these vectors; of items that the catalogue does not hold, none.

        After the first of them the vectors are this chain's own and are written in place. BundleError where they do
        not fit the encoder.
        """
        there, retriever = self._check_vectors(vectors), self.context.retriever
        rows, first = np.unique(self.catalogue.rows(vectors.ids)[::-1], return_index=True)  # of several the last
        values = np.ascontiguousarray(vectors.values[::-1][first][rows >= 0], dtype=np.float32)
        rows = rows[rows >= 0]
        served = self
        if self.learned is None:
            context = replace(self.context, vectors=there.copy())
            served = replace(self, context=context, learned=np.zeros(len(there), bool))._assembled()
        assert served.context.vectors is not None
        assert served.learned is not None
        served.context.vectors[rows] = values
        served.learned[rows] = True
        if retriever is not None and len(rows):
            retriever.upsert(rows, values)
        return served

    def _check_vectors(self, vectors: ItemVectors) -> np.ndarray:
        """The items' vectors that are there."""
        there = self.context.vectors
        if there is None or self.context.retriever is None:
            raise BundleError(f"{self.bundle.name} has no retrieval encoder, so that item vectors have no place in it")
        if vectors.values.shape != (len(vectors.ids), there.shape[1]) or not np.isfinite(vectors.values).all():
            raise BundleError(
                f"item vectors of shape {vectors.values.shape} for {len(vectors.ids)} items: "
                f"finite ones of width {there.shape[1]} are wanted"
            )
        return there

    def changed_items(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """What a ranking's items read that the bundle does not hold: feature -> raw values of rows int64 [n] (-1: an
        unknown item), None where the bundle's own stands; {} where nothing differs."""
        return self.catalogue.changed_values(rows)

    def score_request(
        self,
        state: UserState,
        items: Sequence[str],
        *,
        features: Mapping[str, Any],
        context: Mapping[str, Any],
        item_features: Mapping[str, Sequence[Any]],
        deadline: float | None,
    ) -> ScoreRequest:
        """A user's state and a request's own values as the scorer reads them; the request's win."""
        return ScoreRequest(
            user=user_values(self.schema, state, features),
            history=history_values(self.schema, state),
            items=items,
            item_features=item_features,
            context=context,
            deadline=deadline,
        )

    def check_features(
        self,
        features: Mapping[str, Any],
        context: Mapping[str, Any],
        item_features: Mapping[str, Sequence[Any]],
        items: int,
    ) -> None:
        """RequestError for a feature that the model does not know, or a column of the wrong length."""
        sides = {f.name: f for f in self.schema.features}
        for name in features:
            self._known(sides, name, ("user", "context"), f"/features/{name}")
        for name in context:
            self._known(sides, name, ("user", "context"), f"/context/{name}")
        for name, values in item_features.items():
            self._known(sides, name, ("item",), f"/item_features/{name}")
            if len(values) != items:
                raise RequestError(
                    f"item_features.{name} has {len(values)} values for {items} items", pointer=f"/item_features/{name}"
                )

    def _known(self, all_: Mapping[str, FeatureSpec], name: str, sides: tuple[str, ...], pointer: str) -> None:
        names = [f.name for f in all_.values() if f.side in sides and f.kind != "sequence"]
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(names) or 'none'}"
            raise RequestError(f"the model has no {sides[0]} feature '{name}'{hint}", pointer=pointer)


class ItemsRefused(SchemaError):
    """Some items cannot be served as they are; `items`: their ids."""

    def __init__(self, why: str, items: Sequence[str]) -> None:
        more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
        super().__init__(f"{why} {', '.join(repr(item) for item in items[:5])}{more}")
        self.items = list(items)


class UserEncoder:
    """The user tower: (state, request with `features` and `context`) -> float32 [D].

    tower: may be replaced by what a learner made of it; a call goes on with what it began with.
    """

    def __init__(self, bundle: Bundle, tower: EncoderModel, catalogue: ArrowCatalogue) -> None:
        self.tower = tower
        self._encoder, self._schema, self._catalogue = bundle.encoder, bundle.schema, catalogue

    def __call__(self, state: UserState, request: Mapping[str, Any]) -> np.ndarray:
        values = user_values(self._schema, state, request.get("features") or {})
        query = ScoreRequest(values, history_values(self._schema, state), [], context=request.get("context") or {})
        with torch.inference_mode():
            vector = self.tower.users(self._encoder.encode_request(query, self._catalogue))[0].numpy()
        if not np.isfinite(vector).all():
            raise PlexrankError("the user's vector is not finite")
        return vector


def user_values(schema: Schema, state: UserState, features: Mapping[str, Any]) -> dict[str, Any]:
    """Values by feature: what is stored, over it the user's id, over it what the request says."""
    values = dict(state.features)
    if state.user:
        values |= {f.name: state.user for f in schema.of_request() if f.column == schema.user and f.kind != "sequence"}
    return {**values, **features}


def history_values(schema: Schema, state: UserState) -> dict[str, Sequence[Any]]:
    """The history under the item column's name: every sequence is derived from it."""
    return {schema.item: state.history} if schema.item else {}


def component(plugins: Plugins, kind: str, use: ComponentConfig, *arguments: Any, **defaults: Any) -> Any:
    """A component of the configuration with its options checked. PluginError names the option that is wrong.

    defaults: options that the configuration may leave out.
    """
    cls = plugins.get(kind, use.name)
    try:
        options: PluginOptions = cls.Options.model_validate({**defaults, **use.options})
    except ValueError as error:
        raise PluginError(f"{kind}.{use.name}: {error}") from error
    return cls(options, *arguments)


def _retriever(bundle: Bundle, plugins: Plugins) -> Retriever | None:
    vectors, retrieval = bundle.item_vectors, bundle.config.retrieval
    if vectors is None or retrieval is None:
        return None
    cls = plugins.get("retrievers", retrieval.retriever.name)
    retriever: Retriever = cls(vectors.shape[1], cls.Options.model_validate(retrieval.retriever.options))
    retriever.build(np.arange(len(vectors), dtype=np.int64), vectors)
    return retriever


def _by_positives(context: SourceContext) -> np.ndarray:
    return np.argsort(-context.counts, kind="stable").astype(np.int64)


def _item_vectors(tower: EncoderModel, bundle: Bundle, catalogue: ArrowCatalogue, rows: np.ndarray) -> np.ndarray:
    """Catalogue rows int64 [n] -> float32 [n, D], as the bundle's own vectors were made."""
    with torch.inference_mode():
        made: np.ndarray = tower.items(item_batch(bundle.encoder, catalogue, rows)).numpy()
    return made
