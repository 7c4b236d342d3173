"""What the routes that people read answer with."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from engine.intake import Receipt
from serving.codec import ModelOut


class EventsOut(Struct, omit_defaults=True):
    """One receipt an event, in their order. degraded: what failed after the events were durable."""

    events: list[Receipt]
    degraded: list[str] = []


class WeightOut(Struct):
    """A history item and its weight in the interest model."""

    item: str
    title: str
    weight: float


class ReasonOut(Struct):
    """Why an item stands where it stands. history: largest weights first."""

    item: str
    title: str
    score: float
    position: int
    history: list[WeightOut]
    sources: list[str]
    rules: list[str]


class ExplainOut(Struct):
    """explained_by: version of the bundle that gave the weights, where it is not the one that gave the scores."""

    request_id: str
    user: str
    model: ModelOut
    explained_by: str
    degraded: list[str]
    items: list[ReasonOut]


class UsersOut(Struct):
    users: list[str]


class VisitOut(Struct):
    """An item of the history and when it entered (seconds since 1970)."""

    item: str
    title: str
    time: int


class UserOut(Struct):
    """What is kept of a user. history: newest first; seen: number of items that are left out of recommendations."""

    user: str
    features: dict[str, Any]
    history: list[VisitOut]
    seen: int


class ErasedOut(Struct):
    """What was removed of a user."""

    user: str
    state: bool
    events: int


class CatalogueItemOut(Struct):
    """An item of the catalogue with its columns."""

    id: str
    title: str
    attributes: dict[str, Any]


class PluginOut(Struct):
    """An installed plugin. used: this server works with it."""

    kind: str
    name: str
    distribution: str
    version: str
    module: str
    summary: str
    used: bool


class PluginsOut(Struct):
    plugins: list[PluginOut]


class FollowingOut(Struct):
    """A registry's current version, and how the deltas behind it are followed.

    sequence: of the newest delta in what serves, 0 for the bundle alone; newest_event_age_seconds: since the newest
    event that it was trained on; lag_seconds: age of the newest delta applied, where others wait. gaps: times that a
    delta was missing; swaps: bundles loaded; trouble: why nothing is followed now.
    """

    current: str | None
    epoch: int
    pinned: bool
    sequence: int
    newest_event_age_seconds: float | None
    lag_seconds: float
    applied: int
    gaps: int
    swaps: int
    errors: int
    last_error: str | None
    trouble: str | None


class ModelsOut(Struct):
    """What serves, since when (seconds since 1970), and the bundles that can be loaded by name.

    model.version is that of the answers: the bundle's (base), or a delta's behind it. waiting: events that wait for the
    log; following: null without a registry.
    """

    model: ModelOut
    base: str
    name: str
    since: float
    available: list[str]
    waiting: int
    following: FollowingOut | None


class PointerOut(Struct):
    """The version that is current from now on: it serves within a second, as soon as it is loaded and warmed.

    pinned: without deltas, until it is unpinned.
    """

    version: str
    epoch: int
    reason: str
    pinned: bool
    previous: str | None


class LoadedOut(Struct):
    """The bundle that serves now, and the version before it."""

    model: ModelOut
    previous: str


class AliveOut(Struct):
    status: Literal["live"]


class ReadyOut(Struct):
    """A real scoring was done; took_ms: its time. degraded: what else does not do all that it should."""

    status: Literal["ready"]
    model: ModelOut
    took_ms: float
    degraded: list[str]


ALL: list[type[Any]] = [
    EventsOut,
    ExplainOut,
    UsersOut,
    UserOut,
    ErasedOut,
    CatalogueItemOut,
    PluginsOut,
    FollowingOut,
    ModelsOut,
    PointerOut,
    LoadedOut,
    AliveOut,
    ReadyOut,
]
