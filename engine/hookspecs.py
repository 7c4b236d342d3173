"""Every hook of plexrank on one page.

Registration hooks return component classes and are called once, when a configuration names the component. Two
components of one kind and name are refused, naming both distributions. Moment hooks fire while the engine works; any
number of plugins may answer, and one that raises, stalls past its budget or answers the wrong shape is named in the log
and the metrics and skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pluggy

from engine.components import (
    CandidateSource,
    Dataset,
    DelayedFeedback,
    EmbeddingMethod,
    Encoder,
    EventLog,
    InterestModel,
    Loss,
    Ranker,
    Reranker,
    Retriever,
    Sampler,
    Scorer,
    StateStore,
)

hookspec = pluggy.HookspecMarker("plexrank")
hookimpl = pluggy.HookimplMarker("plexrank")


# ------------------------------------------------------------------------------------------- registration
@hookspec
def embeddings() -> list[type[EmbeddingMethod]]:
    """Ways to turn ids into vectors."""


@hookspec
def interests() -> list[type[InterestModel]]:
    """Models of what a user wants now, given the history."""


@hookspec
def rankers() -> list[type[Ranker]]:
    """Networks that score targets from pooled features and interests."""


@hookspec
def encoders() -> list[type[Encoder]]:
    """User and item towers for retrieval."""


@hookspec
def retrievers() -> list[type[Retriever]]:
    """Indexes that find the nearest items."""


@hookspec
def candidate_sources() -> list[type[CandidateSource]]:
    """Proposers of items for a user."""


@hookspec
def rerankers() -> list[type[Reranker]]:
    """What re-orders or drops ranked items: diversity, caps, business rules."""


@hookspec
def losses() -> list[type[Loss]]:
    """Training objectives."""


@hookspec
def delayed_feedback() -> list[type[DelayedFeedback]]:
    """What a task learns of an impression while its window is open, and how its loss is corrected for that."""


@hookspec
def samplers() -> list[type[Sampler]]:
    """Choosers of negatives."""


@hookspec
def datasets() -> list[type[Dataset]]:
    """Bringers of datasets."""


@hookspec
def event_logs() -> list[type[EventLog]]:
    """Durable logs of events."""


@hookspec
def scorers() -> list[type[Scorer]]:
    """Where inference runs: in process, in Triton."""


@hookspec
def state_stores() -> list[type[StateStore]]:
    """Where users' histories live."""


# ------------------------------------------------------------------------------------------------- moments
@hookspec
def on_train_step(step: int, metrics: Mapping[str, float]) -> None:
    """After an optimizer step; metrics hold at least `loss`."""


@hookspec
def on_checkpoint(path: Path, step: int) -> None:
    """After a checkpoint is durable at `path`."""


@hookspec
def on_publish(bundle: Path, manifest: Mapping[str, Any]) -> None:
    """After a bundle is written and verified."""


@hookspec
def on_event(event: Mapping[str, Any]) -> None:
    """After an event is durable in the log."""


@hookspec
def filter_candidates(user: str, items: Sequence[str], request: Mapping[str, Any]) -> np.ndarray:
    """Which candidates may stay: bool [len(items)]. Answers of several plugins are and-ed."""


@hookspec
def on_response(response: Mapping[str, Any]) -> None:
    """After a ranking was answered; the response as sent. Must not change it."""
