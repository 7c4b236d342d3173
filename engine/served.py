"""All that one bundle contributes to answers: catalogue, candidate sources, rerankers, the user's vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from engine.errors import BundleError, PlexrankError, PluginError, RequestError
from engine.plugins import Plugins
from engine.schema import FeatureSpec, Schema


@dataclass(frozen=True)
class Served:
    """Made once a bundle; requests that began with it end with it, also while another takes its place.

    sources: (name, candidates asked for, source) in the configuration's order. popular: catalogue rows by positives.
    """

    bundle: Bundle
    context: SourceContext
    sources: tuple[tuple[str, int, CandidateSource], ...]
    rerankers: tuple[tuple[str, Reranker], ...]
    popular: np.ndarray

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
        context = SourceContext(
            catalogue=bundle.catalogue,
            counts=bundle.item_counts,
            latest=bundle.item_latest,
            retriever=_retriever(bundle, plugins),
            encode_user=_user_encoder(bundle, plugins),
            vectors=bundle.item_vectors,
        )
        sources = tuple(
            (use.name, use.k, component(plugins, "candidate_sources", use, context)) for use in config.sources
        )
        rerankers = tuple((use.name, component(plugins, "rerankers", use, context)) for use in config.rerankers)
        popular = np.argsort(-context.counts, kind="stable").astype(np.int64)
        return cls(bundle, context, sources, rerankers, popular)

    @property
    def schema(self) -> Schema:
        return self.bundle.schema

    @property
    def catalogue(self) -> ArrowCatalogue:
        return self.bundle.catalogue

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


def _user_encoder(bundle: Bundle, plugins: Plugins) -> Callable[[UserState, Mapping[str, Any]], np.ndarray] | None:
    """The user tower: (state, request with `features` and `context`) -> float32 [D]."""
    model = bundle.encoder_model(plugins)
    if model is None:
        return None
    model.eval()
    encoder, catalogue, schema = bundle.encoder, bundle.catalogue, bundle.schema

    def encode_user(state: UserState, request: Mapping[str, Any]) -> np.ndarray:
        values = user_values(schema, state, request.get("features") or {})
        query = ScoreRequest(values, history_values(schema, state), [], context=request.get("context") or {})
        with torch.inference_mode():
            vector = model.users(encoder.encode_request(query, catalogue))[0].numpy()
        if not np.isfinite(vector).all():
            raise PlexrankError("the user's vector is not finite")
        return vector

    return encode_user
