"""One YAML file describes data, features, plugins, training and serving; every mistake is named with its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from engine.config_learning import LearningConfig
from engine.config_plugins import NAME as NAME
from engine.config_plugins import ComponentConfig as ComponentConfig
from engine.config_plugins import component as _component
from engine.config_plugins import default_name as default_name
from engine.config_triton import TritonConfig
from engine.schema import FeatureSpec, Schema
from engine.section import Section

TASK = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"


# ---------------------------------------------------------------------------------------------------- data
class SourceConfig(Section):
    """Files of one's own: Parquet, CSV/TSV or Arrow; a glob is fine. `PLEXRANK_DATA` is put before relative paths."""

    interactions: str = Field(description="path or glob of the interactions")
    items: str | None = Field(None, description="path of the items' attributes")
    users: str | None = Field(None, description="path of the users' attributes")
    format: Literal["auto", "parquet", "csv", "tsv", "arrow"] = Field("auto", description="by suffix if auto")


class SplitConfig(Section):
    """How rows become train, validation and test."""

    by: Literal["time", "user_tail", "hash", "column"] = Field(
        "time", description="time: oldest first; user_tail: the last part of each user; hash: random by key"
    )
    validation: float = Field(0.1, ge=0, lt=1, description="share of rows (user_tail: of each user's rows)")
    test: float = Field(0.1, ge=0, lt=1, description="share of rows (user_tail: of each user's rows)")
    key: str | None = Field(None, description="hash: column whose values stay together; default the user")
    column: str | None = Field(None, description="column: holds train, validation or test")


class LabelConfig(Section):
    """A task's label: a column as it is (0/1) or compared with a number."""

    column: str = Field(description="column of the interactions")
    at_least: float | None = Field(None, description="positive where the column is >= this; default: the column itself")


class DataConfig(Section):
    """Where rows come from and what they mean."""

    dataset: ComponentConfig | None = Field(None, description="a dataset plugin")
    source: SourceConfig | None = Field(None, description="files of one's own, in place of a dataset")
    user: str | None = Field("user_id", description="column that names the user; null if none")
    item: str | None = Field("item_id", description="column that names the item; null if none")
    time: str | None = Field("timestamp", description="column with the time, in seconds since 1970; null if none")
    title: str | None = Field(None, description="item column shown to people")
    labels: dict[Annotated[str, Field(pattern=TASK)], LabelConfig] = Field(
        min_length=1, description="task -> label; the first task ranks"
    )
    split: SplitConfig = SplitConfig()


# ------------------------------------------------------------------------------------------------- training
class OptimizerConfig(Section):
    """Embedding tables take fused row-wise Adagrad, everything else Adam."""

    embedding_lr: float = Field(0.05, gt=0, description="row-wise Adagrad's learning rate")
    embedding_eps: float = Field(1e-8, gt=0, description="row-wise Adagrad's epsilon")
    dense_lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    dense_weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of the dense part")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of both learning rates")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rates rise")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the dense gradient")


class EarlyStoppingConfig(Section):
    metric: Literal["auc", "gauc", "logloss", "none"] = Field("auc", description="on the validation part")
    patience: int = Field(2, ge=1, description="epochs without improvement before the end")


class ShardingConfig(Section):
    type: Literal["table_wise", "row_wise", "planner"] = Field("table_wise", description="how tables are spread")


class CheckpointConfig(Section):
    every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end of each epoch")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class TrainingConfig(Section):
    """The TorchRec loop."""

    epochs: int = Field(10, ge=1, description="at most")
    batch_size: int = Field(1024, ge=1, description="rows a step, over all processes together")
    eval_batch_size: int = Field(8192, ge=1, description="rows a step when measuring")
    threads: int | None = Field(None, ge=1, description="torch threads a process; default: all cores")
    loss: ComponentConfig = _component("losses")
    optimizer: OptimizerConfig = OptimizerConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    keep_optimizer: bool = Field(
        True, description="the bundle also holds the optimizers' state, from which learning from the stream goes on"
    )
    mini_batch_aware_l2: float = Field(
        0.0, ge=0, description="lambda of mini-batch aware regularisation (Zhou et al. 2018, eq. 6); 0: none"
    )
    calibration: Literal["isotonic", "platt", "none"] = Field("isotonic", description="fitted on the validation part")


# ------------------------------------------------------------------------------------------------ retrieval
class RetrievalConfig(Section):
    """How candidates are found by vectors; leave the section out to do without.

    `lr` was chosen by recall@20 on the validation part of MovieLens-100k, mean of five seeds: .169 with 0.003, .173
    with 0.01, .169 with 0.03 (two seeds: .156 with 0.1).
    """

    encoder: ComponentConfig = _component("encoders")
    loss: ComponentConfig = _component("losses.retrieval")
    sampler: ComponentConfig = _component("samplers")
    retriever: ComponentConfig = _component("retrievers")
    epochs: int = Field(5, ge=1, description="passes over the positives")
    batch_size: int = Field(1024, ge=2, description="positives a step")
    lr: float = Field(1e-2, gt=0, description="Adam's learning rate of the towers and row-wise Adagrad's of the tables")
    temperature: float = Field(0.1, gt=0, description="inner products are divided by this")
    normalize: bool = Field(True, description="vectors of length one")


# ------------------------------------------------------------------------------------------------- serving
class SourceUse(ComponentConfig):
    """A candidate source and how many candidates it brings."""

    k: int = Field(200, ge=1, le=2000, description="candidates")


class LimitsConfig(Section):
    body_bytes: int = Field(1 << 20, ge=1024, description="largest request body")
    items: int = Field(2000, ge=1, le=20_000, description="most items a request")
    id_bytes: int = Field(256, ge=1, description="longest id")
    depth: int = Field(16, ge=2, description="deepest JSON")
    queue: int = Field(64, ge=1, description="requests waiting for a scoring thread before 503")
    threads: int = Field(1, ge=1, description="scoring threads")
    timeout_ms: int = Field(100, ge=1, le=60_000, description="deadline where the request names none")


class ServingConfig(Section):
    """The pipeline and what stands around it."""

    sources: list[SourceUse] = Field(
        default_factory=lambda: [SourceUse(name=default_name("candidate_sources"), options={}, k=200)],
        description="candidate sources, merged in this order",
    )
    rerankers: list[ComponentConfig] = Field(default_factory=list, description="applied in this order")
    filter_seen: bool = Field(True, description="leave out what the user has interacted with")
    scorer: ComponentConfig = _component("scorers")
    state_store: ComponentConfig = _component("state_stores")
    event_log: ComponentConfig = _component("event_logs")
    positive_interactions: list[str] = Field(
        default_factory=lambda: ["click", "conversion"], description="interaction types that enter the history"
    )
    log_rankings: bool = Field(True, description="each answer becomes a `ranking` event, which learning needs")
    log_items: int = Field(200, ge=1, le=20_000, description="most items of an answer in its event")
    forward_bytes: int = Field(
        256 << 20, ge=1 << 16, description="events that may wait on this machine while the event log is away"
    )
    models: str | None = Field(None, description="registry whose current bundle is served, with a learner's deltas")
    history_cap: int = Field(200, ge=1, le=100_000, description="history items kept a user")
    limits: LimitsConfig = LimitsConfig()
    triton: TritonConfig = TritonConfig()
    host: str = Field("127.0.0.1", description="a non-loopback address needs a token")
    port: int = Field(8080, ge=0, le=65535, description="0: any free one")
    token_env: str | None = Field(None, description="environment variable that holds the bearer token")


def _resolve_spaces(features: list[FeatureSpec]) -> list[FeatureSpec]:
    """Refuses names used twice; a sequence that names no space of its own takes its item's."""
    names = [f.name for f in features]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"feature named twice: {', '.join(sorted(twice))}")
    spaces = {f.name: f.space for f in features}
    return [
        f.model_copy(update={"space": spaces[f.of]})
        if f.kind == "sequence" and f.space == f.of and f.of in spaces
        else f
        for f in features
    ]


class EmbeddingConfig(ComponentConfig):
    """How ids become vectors."""

    dim: int = Field(16, gt=0, le=4096, description="width of features that do not name their own")


class Config(Section):
    """A whole configuration file."""

    name: str = Field(pattern=NAME, description="the model's name")
    seed: int = Field(1, ge=0, lt=2**31, description="fixes the result")
    plugins: list[str] = Field(default_factory=list, description="moment-hook plugins to switch on")
    data: DataConfig
    features: Annotated[list[FeatureSpec], AfterValidator(_resolve_spaces)] = Field(
        min_length=1, description="what the model reads; the order is that of its inputs"
    )
    embedding: EmbeddingConfig = Field(
        default_factory=lambda: EmbeddingConfig(name=default_name("embeddings")), description="ids to vectors"
    )
    interest: ComponentConfig | None = Field(None, description="for the sequence features; null: leave them out")
    ranker: ComponentConfig = _component("rankers")
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig | None = None
    serving: ServingConfig = Field(default_factory=ServingConfig)
    learning: LearningConfig = Field(default_factory=LearningConfig, description="from the stream, while serving")

    def schema_(self) -> Schema:
        """The schema with widths resolved: `FeatureSpec.dim` is set on every embedded feature."""
        features = tuple(
            f if f.is_dense else f.model_copy(update={"dim": f.dim or self._dim(f)}) for f in self.features
        )
        return Schema(
            features=features,
            user=self.data.user,
            item=self.data.item,
            time=self.data.time,
            tasks=tuple(self.data.labels),
        )

    def _dim(self, feature: FeatureSpec) -> int:
        """Features of one space have one width: the first that names one decides."""
        for other in self.features:
            if other.space == feature.space and other.dim:
                return other.dim
        return self.embedding.dim


COMPONENT_KINDS: dict[tuple[str, ...], str] = {
    ("data", "dataset"): "datasets",
    ("embedding",): "embeddings",
    ("interest",): "interests",
    ("ranker",): "rankers",
    ("training", "loss"): "losses",
    ("retrieval", "encoder"): "encoders",
    ("retrieval", "loss"): "losses",
    ("retrieval", "sampler"): "samplers",
    ("retrieval", "retriever"): "retrievers",
    ("serving", "sources", "*"): "candidate_sources",
    ("serving", "rerankers", "*"): "rerankers",
    ("serving", "scorer"): "scorers",
    ("serving", "state_store"): "state_stores",
    ("serving", "event_log"): "event_logs",
    ("learning", "join", "feedback", "*"): "delayed_feedback",
}
"""Where a configuration names a plugin -> the plugin's kind; `*` stands for each entry of a list or of a mapping."""


def components(tree: Any) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """(place, kind, value) of every plugin named in a `Config`, or in the dicts and lists of its file."""
    for path, kind in COMPONENT_KINDS.items():
        for place, value in _reach(tree, path, ()):
            yield place, kind, value


def _reach(
    tree: Any, path: tuple[str, ...], place: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if tree is None:
        return
    if not path:
        yield place, tree
    elif path[0] == "*":
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else [])
        for index, value in entries:
            yield from _reach(value, path[1:], (*place, index))
    else:
        value = tree.get(path[0]) if isinstance(tree, dict) else getattr(tree, path[0], None)
        yield from _reach(value, path[1:], (*place, path[0]))
