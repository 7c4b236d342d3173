"""What one server holds: a bundle that answers, users' states, the log of events. Opened once, closed once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from engine.bundle import Bundle, Manifest, read_manifest
from engine.components import EventLog, Scorer, StateStore, UserState
from engine.config import ServingConfig
from engine.deadline import Deadline, Workers
from engine.errors import BundleError, PlexrankError, RequestError
from engine.events import EventLimits, check_id
from engine.explanations import Explanations
from engine.inference.signature import CANDIDATES
from engine.intake import WAITS, Intake, Received
from engine.live_items import LiveItems
from engine.pipeline import Answer, Pipeline, Query
from engine.plugins import Plugins, installed
from engine.served import Served, component
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.forward import ForwardingLog
from engine.streaming.events.item_tail import ItemTail, learnt_place
from engine.streaming.events.open_log import placed
from serving.event_log import open_forwarding
from serving.following import served_first
from serving.ranking_log import Counts, RankingLog

log = logging.getLogger("plexrank.serving")

_SEEDED = "users-seeded"
_ITEMS = "items"
"""File of the state directory that keeps what events said of items."""
_ITEM_PLACE = "items-place"
"""File beside it: how far the log was read for them."""
_CHUNK = 5000
_UNTOLD = 1000
"""Answers that may wait until plugins have heard of the ones before; beyond them plugins are not told."""
_ROOM = 0.5
"""Share of the room for waiting events that answers may fill; the rest is for what users do."""

T = TypeVar("T")


@dataclass(frozen=True)
class Erased:
    """What was removed of a user."""

    state: bool
    events: int


class Service:
    """The work behind the routes, without HTTP. Safe from many threads; every method blocks."""

    def __init__(
        self,
        path: Path,
        config: ServingConfig | None,
        state_dir: Path,
        plugins: Plugins,
        served: Served,
        scorer: Scorer,
        store: StateStore,
        events: EventLog,
    ) -> None:
        self.path, self.state_dir, self.plugins = path, state_dir, plugins
        self.scorer, self.store, self.log = scorer, store, events
        self.config = config or served.bundle.config.serving
        self._override = config
        self._loading = threading.Lock()
        self._told = Workers("on-response", 1)
        self.since = time.time()
        limits = self.config.limits
        self.pipeline = Pipeline(
            served,
            scorer,
            store,
            plugins,
            threads=limits.threads,
            items=limits.items,
            filter_seen=self.config.filter_seen,
        )
        self.explanations = Explanations(self.pipeline)
        self.forgetful: list[Callable[[str], None]] = [self.explanations.forget]  # called with a user to be erased
        self.intake = Intake(
            events,
            store,
            plugins,
            positive=self.config.positive_interactions,
            limits=EventLimits(limits.id_bytes, limits.depth),
        )
        self.items = LiveItems(self.pipeline, scorer, path=state_dir / _ITEMS)
        self.intake.on_items = self.items.add_events
        self.item_tail = ItemTail(
            events,
            self.items,
            state_dir / _ITEM_PLACE,
            limits=self.intake.limits,
            learnt=learnt_place(served.bundle.manifest.metrics),
        )
        self.registry: ModelRegistry | None = None
        self.rankings: RankingLog | None = None
        if self.config.log_rankings:
            self.rankings = RankingLog(events, lambda: self.pipeline.served, self.config.log_items, self._room)

    @classmethod
    def open(
        cls,
        bundle: Path | None,
        config: ServingConfig | None,
        state_dir: Path,
        plugins: Plugins | None = None,
        models: Path | None = None,
    ) -> Self:
        """Loads the bundle, opens store and log, puts the bundle's users in at the first start, replays the log's tail.

        config: by default the one in the bundle. models: the registry whose current bundle is served in place of
        `bundle`, which then may be left out; by default `serving.models`. Raises BundleError, PluginError, EventError.
        """
        plugins = plugins or installed()
        registry = None
        manifest = None if bundle is None else read_manifest(bundle)
        if models is None:
            models = _models_of(config, manifest)
        if models is not None:
            registry = ModelRegistry(models, None if manifest is None else manifest.name)
            bundle = served_first(registry, bundle)
        if bundle is None:
            raise BundleError("name a bundle, or with --models a registry of bundles")
        bundle = bundle.resolve()
        served = Served.open(bundle, config, plugins)
        config_ = config or served.bundle.config.serving
        plugins.enable(served.bundle.config.plugins)
        scorer: Scorer = component(plugins, "scorers", config_.scorer)
        with ExitStack() as undo:
            undo.callback(scorer.close)
            scorer.load(bundle)
            state_dir.mkdir(parents=True, exist_ok=True)
            store: StateStore = component(
                plugins,
                "state_stores",
                placed(plugins, "state_stores", config_.state_store, state_dir),
                config_.history_cap,
            )
            undo.callback(store.close)
            events = open_forwarding(plugins, config_, state_dir)
            undo.pop_all()
        service = cls(bundle, config, state_dir, plugins, served, scorer, store, events)
        service.registry = registry
        service._seed()
        service.intake.recover()
        service.intake.on_items = service.item_tail.start().own
        return service

    # ---------------------------------------------------------------------------------------------- answers
    def rank(self, query: Query, items: Sequence[str], item_features: Any) -> Answer:
        return self.begin_rank(query, items, item_features, _as_it_is).result()

    def recommend(self, query: Query, count: int, exclude: Sequence[str]) -> Answer:
        return self.begin_recommend(query, count, exclude, _as_it_is).result()

    def begin_rank(
        self, query: Query, items: Sequence[str], item_features: Any, finish: Callable[[Answer], T]
    ) -> Future[T]:
        """Does not block; the future's outcome is what `finish` makes of the answer, in a worker's thread.

        RequestError (503) where too many are ahead.
        """
        steps = self.pipeline.ranking(query, items, item_features)
        return self.pipeline.admit(steps, len(items), query.deadline, lambda answer: finish(self._answered(answer)))

    def begin_recommend(
        self, query: Query, count: int, exclude: Sequence[str], finish: Callable[[Answer], T]
    ) -> Future[T]:
        """As `begin_rank`, for items that are to be found."""
        steps = self.pipeline.recommendation(query, count, exclude)
        items = min(self.pipeline.items, sum(k for _, k, _ in self.pipeline.served.sources))
        return self.pipeline.admit(steps, items, query.deadline, lambda answer: finish(self._answered(answer)))

    def begin_infer(
        self, inputs: Mapping[str, np.ndarray], deadline: Deadline, finish: Callable[[Mapping[str, np.ndarray]], T]
    ) -> Future[T]:
        """As `begin_rank`, for one request's tensors (`engine.inference.signature`) and its scores alone."""
        return self.pipeline.admit(
            self.pipeline.inferring(inputs, deadline), len(inputs.get(CANDIDATES, ())), deadline, finish
        )

    def _answered(self, answer: Answer) -> Answer:
        answer.degraded += self.degraded()
        self.explanations.keep(answer)
        if self.rankings is not None:
            self.rankings.add(answer)
        if self.plugins.listens("on_response") and self._told.open < _UNTOLD:
            self._told.begin(self._tell, answer)
        return answer

    def _tell(self, answer: Answer) -> None:
        """Plugins hear of an answer after it was given, so they cannot hold it up."""
        response = {
            "request_id": answer.request_id,
            "user": answer.user,
            "model": {"name": answer.model, "version": answer.version},
            "items": list(answer.items),
            "scores": answer.scores.tolist(),
            "degraded": list(answer.degraded),
        }
        self.plugins.notify("on_response", response=response)

    def receive(self, documents: Sequence[bytes | msgspec.Raw]) -> Received:
        return self.intake.receive(documents)

    # ----------------------------------------------------------------------------------------------- stream
    @property
    def waits(self) -> bool:
        """Whether events wait on this machine because the log is away."""
        return isinstance(self.log, ForwardingLog) and self.log.waits

    @property
    def waiting(self) -> int:
        """How many."""
        return self.log.waiting if isinstance(self.log, ForwardingLog) else 0

    def degraded(self) -> list[str]:
        """What of the stream does not do all that it should."""
        return [WAITS] if self.waits else []

    @property
    def dead(self) -> int:
        """Events that waited and that the log would not take at all."""
        return self.log.dead if isinstance(self.log, ForwardingLog) else 0

    @property
    def logged(self) -> Counts:
        """Answers that are in the log, and those that are not."""
        return Counts() if self.rankings is None else self.rankings.counts

    def _room(self) -> bool:
        return not isinstance(self.log, ForwardingLog) or self.log.spool.share < _ROOM

    # ------------------------------------------------------------------------------------------------ users
    def user(self, user: str) -> UserState:
        """What is kept of a user. PlexrankError where the store does not answer."""
        with _part("the state store"):
            return self.store.get(user)

    def users(self, limit: int, prefix: str) -> list[str]:
        """The first names that begin so. PlexrankError where the store does not answer."""
        with _part("the state store"):
            return self.store.users(limit, prefix)

    def erase(self, user: str) -> Erased:
        """Removes a user's events, state and what is kept in memory. One that fails raises after the others went."""
        if self.rankings is not None:
            self.rankings.forget(user)
        try:
            with _part("the event log"):
                events = self.log.erase(user)
        finally:
            try:
                with _part("the state store"):
                    state = self.store.delete(user)
            finally:
                for forget in self.forgetful:
                    forget(user)
        return Erased(state, events)

    # -------------------------------------------------------------------------------------------- bundles
    @property
    def models_root(self) -> Path:
        """The folder whose bundles may be loaded by name."""
        return self.path.parent

    def names(self) -> list[str]:
        """Bundles beside the one that serves."""
        return sorted(manifest.parent.name for manifest in self.models_root.glob("*/manifest.json"))

    def load(self, name: str | None = None) -> Bundle:
        """Another bundle of the same folder, or the same one again. Refused, the one before goes on; BundleError."""
        if self.registry is not None:
            raise RequestError("a registry says what is served: promote a version of it", status=409)
        target = self.path
        if name is not None:
            target = (self.models_root / name).resolve()
            if target.parent != self.models_root or not (target / "manifest.json").is_file():
                raise RequestError(f"there is no bundle '{name}' beside {self.path.name}", status=404, pointer="/name")
        return self.serve(target)

    def serve(self, target: Path) -> Bundle:
        """A bundle by its folder. Refused, the one before goes on; BundleError, RequestError (409) while one loads."""
        if not self._loading.acquire(blocking=False):
            raise RequestError("another bundle is being loaded", status=409)
        try:
            served = Served.open(target, self._override, self.plugins)
            try:
                self.scorer.load(target)
            except PlexrankError:
                raise
            except Exception as error:
                raise BundleError(f"{target.name}: {type(error).__name__}: {error}") from error
            self.items.swap(served)
            self.item_tail.serves(learnt_place(served.bundle.manifest.metrics))
            self.path, self.since = target, time.time()
        finally:
            self._loading.release()
        log.info("serves %s %s", served.bundle.name, served.bundle.version)
        return served.bundle

    def used(self) -> set[tuple[str, str]]:
        """(kind, name) of the plugins that this server works with."""
        bundle = self.pipeline.served.bundle
        uses = {(entry.kind, entry.name) for entry in bundle.manifest.plugins}
        serving = [
            *(("candidate_sources", use.name) for use in self.config.sources),
            *(("rerankers", use.name) for use in self.config.rerankers),
            ("scorers", self.config.scorer.name),
            ("state_stores", self.config.state_store.name),
            ("event_logs", self.config.event_log.name),
            *(("moments", name) for name in bundle.config.plugins),
        ]
        return uses | set(serving)

    def check_user(self, user: str) -> str:
        """RequestError for a text that cannot be a user's id."""
        try:
            return check_id(user, self.intake.limits, "the user's id") if user else _no_user()
        except PlexrankError as error:
            raise RequestError(str(error)) from None

    def _seed(self) -> None:
        """At the first start the bundle's users enter an empty store; never again, so that the erased stay erased."""
        marker = self.state_dir / _SEEDED
        if marker.exists():
            return
        try:
            if not self.store.users(limit=1):
                users = self.pipeline.served.bundle.users()
                while chunk := list(islice(users, _CHUNK)):
                    self.store.put(chunk)
        except BundleError:
            raise
        except Exception as error:
            log.warning("the bundle's users are not in the state store yet: %s: %s", type(error).__name__, error)
            return
        marker.touch()

    def close(self) -> None:
        """Ends the workers, then store and log."""
        self.pipeline.close()
        self._told.close()
        if self.rankings is not None:
            self.rankings.close()
        self.item_tail.close()
        self.items.close()
        self.scorer.close()
        self.store.close()
        self.log.close()


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Whatever a store or a log raises, as a PlexrankError."""
    try:
        yield
    except PlexrankError:
        raise
    except Exception as error:
        log.warning("%s: %s: %s", name, type(error).__name__, error)
        raise PlexrankError(f"{name} does not do what it is asked ({type(error).__name__}); try again soon") from error


def _models_of(config: ServingConfig | None, manifest: Manifest | None) -> Path | None:
    """The registry that the configuration names, or where there is none, the bundle's."""
    if config is not None:
        named = config.models
    else:
        named = None if manifest is None else (manifest.config.get("serving") or {}).get("models")
    return None if named is None else Path(named)


def _as_it_is(answer: Answer) -> Answer:
    return answer


def _no_user() -> str:
    raise RequestError("the user's id is empty")
