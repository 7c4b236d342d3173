"""What proposes and orders the items of an answer, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa

from engine.components.base import Component, PluginOptions
from engine.components.retrieval import Retriever


@dataclass
class UserState:
    """What is known of a user: features (raw values) and the history, newest first."""

    user: str
    features: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)


class Catalogue(ABC):
    """The items of a bundle: row <-> id, features and attributes by row. Implemented in `engine.catalogue`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 [n], -1 where unknown."""

    @abstractmethod
    def ids(self, rows: np.ndarray) -> list[str]: ...

    @abstractmethod
    def column(self, name: str) -> pa.Array:
        """An attribute or feature of all items, by row."""


@dataclass
class SourceContext:
    """What a candidate source or a reranker may use; made once for a served bundle.

    counts int64 [items]: positives in the training split; latest int64 [items]: time of the newest event (0: none).
    retriever and encode_user are None where the configuration has no encoder.
    vectors float32 [items, D]: item vectors of the encoder, or None.
    """

    catalogue: Catalogue
    counts: np.ndarray
    latest: np.ndarray
    retriever: Retriever | None = None
    encode_user: Any = None  # Callable[[UserState, Mapping[str, Any]], np.ndarray [D]]
    vectors: np.ndarray | None = None


@dataclass
class Candidates:
    """Rows of the catalogue int64 [n], best first, with the source's score float32 [n]."""

    rows: np.ndarray
    scores: np.ndarray


class CandidateSource(Component, ABC):
    """Proposes items for a user."""

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        self.options = options
        self.context = context

    @abstractmethod
    def candidates(self, user: UserState, request: Mapping[str, Any], k: int) -> Candidates: ...

    def grown(self, context: SourceContext) -> Self:
        """This source over a catalogue that has grown from its own; a request that has this one goes on with it.

        Rows keep their numbers and their `counts` and `latest`; new ones stand behind them. Made anew by default; a
        source that sorts or reads all items may take over what it knows, as this is called for each few item events.
        """
        return type(self)(self.options, context)


class Reranker(Component, ABC):
    """Re-orders or drops ranked items."""

    def __init__(self, options: PluginOptions, context: SourceContext) -> None:
        self.options = options
        self.context = context

    @abstractmethod
    def rerank(self, rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, dict[int, str]]:
        """rows int64 [n] of the catalogue (-1: unknown item), scores float32 [n] descending, k wanted.

        -> positions int64 [<= k] into `rows`, best first, and position -> rule applied, for explanations.
        """
