"""Where scoring runs, and where users' histories are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.components.base import Component, PluginOptions
from engine.components.candidates import Catalogue, UserState
from engine.components.measures import Measure
from engine.errors import PlexrankError

if TYPE_CHECKING:
    from engine.inference.signature import Signature
    from engine.streaming.deltas.delta import Delta


SCORED_BY = "; scored by "
"""In `Scores.degraded`, before the name of what stood in."""


@dataclass
class ScoreRequest:
    """One request, columnar. Features left out take their neutral value (no id, mean).

    user: raw values by feature name; history: sequence feature -> raw ids, newest first;
    items: raw ids [N]; item_features: feature -> list of N raw values that override the catalogue's.
    """

    user: Mapping[str, Any]
    history: Mapping[str, Sequence[Any]]
    items: Sequence[str]
    item_features: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    deadline: float | None = None  # time.monotonic() by which an answer is of use


@dataclass
class Scores:
    """task -> calibrated probabilities float32 [N], with the model that made them.

    degraded: what the scorer did without for this request, each `part: why`; with `SCORED_BY` in it where what was to
    score did not, and another copy of the model did.
    """

    tasks: dict[str, np.ndarray]
    model: str
    version: str
    degraded: tuple[str, ...] = ()


class Scorer(Component, ABC):
    """Scores requests with one bundle; swaps bundles and applies deltas while scoring."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def load(self, bundle: Path) -> None:
        """Verifies, warms and swaps; raises BundleError and goes on with the old one if the bundle is not fit."""

    @abstractmethod
    def score(self, request: ScoreRequest) -> Scores: ...

    @property
    def signature(self) -> Signature:
        """The tensors that `infer` takes and gives. PlexrankError where it answers none."""
        raise PlexrankError(f"scorer '{self.name}' does not answer tensors")

    def infer(self, tensors: Mapping[str, np.ndarray], deadline: float | None = None) -> dict[str, np.ndarray]:
        """One request as tensors of one dimension by name, as `signature` says (`engine.inference.tensors.encode` makes
        them) -> each task's probabilities float32 [N], as `score` gives them, and `version`. deadline: as a request's.

        RequestError names a tensor that does not fit. PlexrankError where the scorer does not answer tensors.
        """
        raise PlexrankError(f"scorer '{self.name}' does not answer tensors")

    @abstractmethod
    def explain(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """sequence feature -> weights float32 [N, H] of the history items for each candidate."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Of what scores now: the bundle's version, and behind it the delta's (`engine.streaming.deltas.delta`)."""

    @abstractmethod
    def apply(self, delta: Delta) -> None:
        """A learner's row delta, in chunks, with no lock on the way of `score`; the dense part swaps at once, together
        with the calibration in it (`engine.streaming.learning.recalibration.apart`).

        DeltaGap where it does not follow what is there (another base, epoch or parent): nothing was changed, and the
        caller loads the bundle. One that was applied already is ignored. BundleError where it does not fit the model.
        What it holds of the retrieval encoder (`engine.streaming.deltas.encoder_delta`) is passed over.
        """

    def items_changed(self, version: str, catalogue: Catalogue, rows: np.ndarray | None) -> None:
        """Items came or changed: what items' features are read from, until a bundle of another version is loaded.

        version: of the bundle that the catalogue grew from; another than the loaded one's: nothing is to be done.
        catalogue: rows keep their numbers, new items stand behind them. rows int64 [m], distinct: those that are new,
        or read otherwise than in the catalogue given before; None: all of it is to be read anew, as the first one is.
        Called aside of requests, before the pipeline proposes the items. A scorer that keeps to the bundle's catalogue
        does nothing: new items are unknown to it, and score as such.
        """

    @abstractmethod
    def health(self) -> None:
        """A real inference; raises if it fails."""

    def degraded(self) -> Sequence[str]:
        """What it does without at the moment, each `part: why`."""
        return ()

    def measures(self) -> Sequence[Measure]:
        """What it counts, for the server's metrics; read whenever they are asked for, from any thread."""
        return ()

    @property
    def metrics_url(self) -> str | None:
        """Where the server that scores shows metrics of its own, in Prometheus' format; None where there is none."""
        return None

    def close(self) -> None:
        """Ends threads and connections; it is not asked again."""


class StateStore(Component, ABC):
    """Users' features and histories; capped, erasable, safe from many threads.

    An option `path`, where a store or a log has one, is taken relative to the server's state directory.
    """

    def __init__(self, options: PluginOptions, history_cap: int) -> None:
        self.options = options
        self.history_cap = history_cap

    @abstractmethod
    def get(self, user: str) -> UserState:
        """An unknown user gives an empty state."""

    @abstractmethod
    def append(self, user: str, items: Sequence[str], times: Sequence[int], *, positive: bool) -> None:
        """Adds interactions; positives enter the history, all enter `seen`."""

    @abstractmethod
    def update(self, user: str, features: Mapping[str, Any]) -> None:
        """Merges features into a user's; None removes one."""

    @abstractmethod
    def put(self, states: Sequence[UserState]) -> None:
        """Writes whole states (a bundle's users at first start)."""

    @abstractmethod
    def delete(self, user: str) -> bool: ...

    @abstractmethod
    def users(self, limit: int = 100, prefix: str = "") -> list[str]: ...

    @abstractmethod
    def close(self) -> None: ...
