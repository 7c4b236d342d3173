"""The section `learning`: how events are joined, what is trained from them, and what is published when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.config_plugins import ComponentConfig
from engine.section import Section


class JoinConfig(Section):
    """Interactions meet the ranking that showed their item, within a window of event time."""

    labels: dict[str, list[str]] = Field(
        default_factory=dict,
        description="task -> interaction types that make it positive; default: the first task takes "
        "serving.positive_interactions, another the type of its own name",
    )
    window_seconds: float | dict[str, float] = Field(
        1800.0, description="how long after a ranking an interaction counts; one number, or task -> seconds"
    )
    feedback: dict[str, ComponentConfig] = Field(
        default_factory=dict,
        description="task -> plugin of kind delayed_feedback: what is learnt of an impression while its window is open",
    )
    lateness_seconds: float = Field(60.0, ge=0, description="how far events may be out of order")
    idle_seconds: float = Field(
        5.0,
        gt=0,
        description="a partition silent for so long no longer holds the others up; where all are, event time goes on "
        "with this machine's clock",
    )
    future_seconds: float = Field(
        300.0, gt=0, description="an event further ahead of this machine's clock goes to the dead letters"
    )
    negatives: float = Field(
        1.0, gt=0, le=1, description="share of the negatives that is trained; logits are corrected for it"
    )
    late: Literal["correct", "drop"] = Field(
        "correct", description="an interaction behind its window: a correcting example, or only counted"
    )
    max_pending: int = Field(
        1_000_000, ge=1, description="shown items that wait for their window's end; beyond it the oldest end early"
    )
    remembered: int = Field(1_000_000, ge=1, description="newest (source, id) pairs known, so that a copy counts once")


class PublishConfig(Section):
    """Row deltas, and whole bundles now and then."""

    interval_seconds: float = Field(0.2, gt=0, description="time between two deltas")
    rows: int = Field(10_000, ge=1, description="changed rows that make a delta due at once")
    dense_seconds: float = Field(1.0, ge=0, description="time between two deltas that carry the dense part; 0: each")
    dtype: Literal["float32", "int8"] = Field("float32", description="of the rows' values on the way")
    bundle_seconds: float = Field(600.0, gt=0, description="time between two whole bundles")
    keep: int = Field(5, ge=2, description="bundles kept")


class GuardConfig(Section):
    """Publishing stops when the model gets worse than this."""

    window: int = Field(
        20_000, ge=100, description="newest examples that are judged, and that the calibration is fitted on"
    )
    minimum: int = Field(2_000, ge=10, description="examples before there is a judgement")
    logloss_ratio: float | None = Field(
        1.05,
        gt=1,
        description="most log loss over a window, as a multiple of that of the bundle the learner began with, same "
        "rows; over n examples the excess may be sqrt(window / n) times as large",
    )
    auc_drop: float | None = Field(
        0.02,
        gt=0,
        description="most loss of AUC against that bundle over a window, same rows; over fewer, likewise more",
    )
    calibration: float | None = Field(
        0.3,
        gt=0,
        description="furthest that predicted over observed positives may be from 1, and be so more than that bundle's",
    )
    rollback: bool = Field(True, description="also go back to the last good version")


class LearningConfig(Section):
    """Learning from the stream; the log is that of `serving.event_log`."""

    join: JoinConfig = JoinConfig()
    source: Literal["events", "examples"] = Field(
        "events", description="join raw events, or read joined examples that another learner writes"
    )
    group: str | None = Field(
        None,
        pattern=r"^[a-zA-Z0-9._-]{1,100}$",
        description="learners of this name share the partitions out as they come and go; needs a log with groups",
    )
    write_examples: bool = Field(
        False, description="also write joined examples, as Arrow batches, to stream 'examples'"
    )
    batch_size: int = Field(256, ge=1, description="examples a step")
    max_delay_seconds: float = Field(0.1, ge=0, description="a smaller batch is trained rather than wait longer")
    chunk: int = Field(500, ge=1, description="records taken of one partition before the next has its turn")
    embedding_lr: float | None = Field(None, gt=0, description="default: training.optimizer.embedding_lr")
    dense_lr: float | None = Field(
        None, gt=0, description="default: training.optimizer.dense_lr x batch_size / training.batch_size"
    )
    checkpoint_seconds: float = Field(30.0, gt=0, description="time between two checkpoints")
    checkpoint_events: int | None = Field(None, ge=1, description="events between two checkpoints, in place of time")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    admission: int = Field(1, ge=1, description="an id is trained in rows of its own from its n-th example on")
    retrieval: bool = Field(True, description="the encoder of `retrieval` learns too, from the stream's positives")
    expiry_seconds: float | None = Field(None, gt=0, description="rows unseen for so long are forgotten")
    dead_share: float = Field(0.5, gt=0, le=1, description="share of dead letters among the last 1,000 that stops")
    publish: PublishConfig = PublishConfig()
    guard: GuardConfig = GuardConfig()
