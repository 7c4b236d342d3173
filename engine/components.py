"""The contracts that plugins fulfil: one base class a kind.

Shapes: B rows, U users, N targets, D width, T total length of jagged values, Q queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.schema import FeatureSpec

if TYPE_CHECKING:
    from engine.data.statistics import IdStatistics


class PluginOptions(BaseModel):
    """Options of a component: unknown keys and wrong types are configuration errors with their line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Component:
    """What the registry holds: a class with a `name`, its options and one line that says what it is."""

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------ embedding


@dataclass(frozen=True)
class Memory:
    """Bytes, measured: training counts parameters and optimizer state, inference the frozen form."""

    training: int
    inference: int


class EmbeddingMethod(nn.Module, Component, ABC):
    """Ids to vectors, one vector a value, *unpooled*, so that a target and a history look into the same table.

    features: the embedded features (never dense ones), `FeatureSpec.dim` already resolved.
    statistics: space -> distinct fingerprints and their counts in the training split; empty unless
        `needs_statistics` (then the engine passes over the data first, and keeps them in the bundle).
    """

    needs_statistics: ClassVar[bool] = False

    @classmethod
    def wants_statistics(cls, options: PluginOptions) -> bool:
        """Whether statistics are needed with these options; the engine asks this."""
        return cls.needs_statistics

    def __init__(
        self, features: Sequence[FeatureSpec], options: PluginOptions, statistics: Mapping[str, IdStatistics]
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.options = options

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """feature -> width of its vectors; features of one space have one width."""

    @abstractmethod
    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Fingerprints (int64; a stride per key may differ) -> float32 [T_f, widths[f]] a feature, lengths kept."""

    @abstractmethod
    def memory_bytes(self) -> Memory: ...

    @abstractmethod
    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        """table -> distinct rows (int64) that these ids read; what a delta has to carry."""

    @abstractmethod
    def freeze(self) -> nn.Module:
        """The smallest inference form: the same forward, plain tensors, no optimizer, no process group."""


# ------------------------------------------------------------------------------------------------- interest


class InterestModel(nn.Module, Component, ABC):
    """What a user wants now, given the history and a target.

    dim: D, the width of a target's and of a history item's vector. `output_dim`: K.
    """

    output_dim: int

    def __init__(self, dim: int, options: PluginOptions) -> None:
        super().__init__()
        self.dim = dim
        self.options = options
        self.output_dim = dim

    @abstractmethod
    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        """targets [N, D], history [T, D] over U users (newest first), user_of_target [N] int64 -> [N, K].

        A user without history gives zeros. Never pads to the longest history.
        """

    @abstractmethod
    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        """The weight of each history item for each target: values [P, 1] over N targets, in the history's order."""


# --------------------------------------------------------------------------------------------------- ranker


@dataclass(frozen=True)
class InputSpec:
    """Widths of what a network reads: fields (name -> width, in order) and the number of dense columns."""

    fields: dict[str, int]
    dense: int = 0
    from_request: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        return sum(self.fields.values()) + self.dense


@dataclass
class Inputs:
    """What a ranker or tower reads: fields name -> [N, width] (pooled, user side repeated), dense [N, M]."""

    fields: dict[str, Tensor]
    dense: Tensor

    def concat(self) -> Tensor:
        """All columns behind one another -> [N, InputSpec.width]."""
        return torch.cat([*self.fields.values(), self.dense], dim=1)


class Ranker(nn.Module, Component, ABC):
    """Scores targets for one or more tasks."""

    def __init__(self, inputs: InputSpec, tasks: Sequence[str], options: PluginOptions) -> None:
        super().__init__()
        self.inputs = inputs
        self.tasks = list(tasks)
        self.options = options

    @abstractmethod
    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """-> task -> logits float32 [N]."""


# ------------------------------------------------------------------------------------------------ retrieval


class Encoder(nn.Module, Component, ABC):
    """Two sides into one space, where the inner product ranks."""

    output_dim: int

    def __init__(self, user: InputSpec, item: InputSpec, options: PluginOptions) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def users(self, inputs: Inputs) -> Tensor:
        """User and context fields, the pooled history among them -> [U, D]."""

    @abstractmethod
    def items(self, inputs: Inputs) -> Tensor:
        """Item fields -> [M, D] or [M, V, D] for several vectors an item."""


class Loss(nn.Module, Component, ABC):
    """A training objective.

    trains: what it is for, "ranker" or "encoder" or both; a configuration that uses it elsewhere is refused.
    """

    trains: ClassVar[frozenset[str]] = frozenset({"ranker"})

    def __init__(self, options: PluginOptions) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **context: Tensor) -> Tensor:
        """Rankers: logits [N], labels [N]. Encoders: logits [B, M] of users against items, labels [B] the positive's
        column; `context` may hold `log_q` [M] (log sampling probability) and `mask` [B, M] (true: not a negative)."""


class Sampler(Component, ABC):
    """Chooses negatives for an encoder's batch."""

    def __init__(self, options: PluginOptions, counts: np.ndarray, seed: int) -> None:
        """counts: int64 [items], how often each catalogue item is a positive in the training split."""
        self.options = options

    @abstractmethod
    def sample(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        """positives: int64 [B] catalogue rows -> (items [M] int64 whose first B are the positives, log_q [M])."""


class Retriever(Component, ABC):
    """Nearest items by inner product. Ids are int64; searching while upserting is safe."""

    def __init__(self, dim: int, options: PluginOptions) -> None:
        self.dim = dim
        self.options = options

    @abstractmethod
    def build(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids int64 [n], vectors float32 [n, D]; replaces what was there."""

    @abstractmethod
    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> None: ...

    @abstractmethod
    def delete(self, ids: np.ndarray) -> None: ...

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """queries float32 [Q, D] -> ids int64 [Q, k] (-1 where fewer), scores float32 [Q, k] descending (-inf there).

        allowed: int64 ids that may be returned, or None for all.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes into an existing, empty folder; safetensors, no pickle."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Memory-maps what `save` wrote."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """size, dim, bytes and whatever describes the index."""


# ------------------------------------------------------------------------------------------------- pipeline


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


# --------------------------------------------------------------------------------------------------- data


@dataclass
class DatasetFiles:
    """Where a dataset lies: interactions (in any order), and the items' and users' attributes if there are any.

    Items have the schema's item column (and may have `title`), users the user column.
    """

    interactions: list[Path]
    items: Path | None = None
    users: Path | None = None


class Dataset(Component, ABC):
    """Brings a dataset to Parquet files on this machine."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def prepare(self, cache: Path) -> DatasetFiles:
        """Fetches or converts once into `cache`; a second call is quick. DataError says where the data comes from."""


# ------------------------------------------------------------------------------------------------- serving


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
    """task -> calibrated probabilities float32 [N], with the model that made them."""

    tasks: dict[str, np.ndarray]
    model: str
    version: str


class Scorer(Component, ABC):
    """Scores requests with one bundle; swaps bundles and applies deltas while scoring."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def load(self, bundle: Path) -> None:
        """Verifies, warms and swaps; raises BundleError and goes on with the old one if the bundle is not fit."""

    @abstractmethod
    def score(self, request: ScoreRequest) -> Scores: ...

    @abstractmethod
    def explain(self, request: ScoreRequest) -> dict[str, np.ndarray]:
        """sequence feature -> weights float32 [N, H] of the history items for each candidate."""

    @abstractmethod
    def apply(self, delta: Any) -> None:
        """Row delta of a learner; a gap or a wrong checksum raises BundleError."""

    @abstractmethod
    def health(self) -> None:
        """A real inference; raises if it fails."""


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


@dataclass(frozen=True)
class LogRecord:
    """One stored event: its position in its partition, its key and its bytes (CloudEvents JSON)."""

    partition: int
    offset: int
    key: str
    value: bytes


class EventLog(Component, ABC):
    """A durable, ordered log of events, partitioned by key."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def append(self, events: Sequence[tuple[str, bytes]]) -> list[tuple[int, int]]:
        """(key, bytes) each -> (partition, offset) each; durable when it returns."""

    @abstractmethod
    def read(self, positions: Mapping[int, int], limit: int = 1000) -> Iterator[LogRecord]:
        """Records at and after `positions` (partition -> offset), in order within a partition."""

    @abstractmethod
    def ends(self) -> dict[int, int]:
        """partition -> the offset that its next record gets."""

    @abstractmethod
    def erase(self, key: str) -> int:
        """Removes a key's records from what `read` returns and leaves a tombstone; how many there were."""

    @abstractmethod
    def close(self) -> None: ...


KINDS: dict[str, type[Component]] = {
    "embeddings": EmbeddingMethod,
    "interests": InterestModel,
    "rankers": Ranker,
    "encoders": Encoder,
    "retrievers": Retriever,
    "candidate_sources": CandidateSource,
    "rerankers": Reranker,
    "losses": Loss,
    "samplers": Sampler,
    "datasets": Dataset,
    "event_logs": EventLog,
    "scorers": Scorer,
    "state_stores": StateStore,
}
"""kind (also the name of its registration hook) -> base class."""
