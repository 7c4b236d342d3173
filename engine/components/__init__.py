"""The contracts that plugins fulfil: one base class a kind, here to be imported from one place."""

from __future__ import annotations

from engine.components.base import Component, PluginOptions
from engine.components.candidates import Candidates, CandidateSource, Catalogue, Reranker, SourceContext, UserState
from engine.components.datasets import Dataset, DatasetFiles
from engine.components.feedback import DelayedFeedback
from engine.components.logs import Capability, EventLog, LogReader, LogRecord
from engine.components.networks import EmbeddingMethod, Inputs, InputSpec, InterestModel, Loss, Memory, Ranker
from engine.components.retrieval import Encoder, Retriever, Sampler
from engine.components.serving import Scorer, ScoreRequest, Scores, StateStore

KINDS: dict[str, type[Component]] = {
    "embeddings": EmbeddingMethod,
    "interests": InterestModel,
    "rankers": Ranker,
    "encoders": Encoder,
    "retrievers": Retriever,
    "candidate_sources": CandidateSource,
    "rerankers": Reranker,
    "losses": Loss,
    "delayed_feedback": DelayedFeedback,
    "samplers": Sampler,
    "datasets": Dataset,
    "event_logs": EventLog,
    "scorers": Scorer,
    "state_stores": StateStore,
}
"""kind (also the name of its registration hook) -> base class."""

__all__ = [
    "KINDS",
    "CandidateSource",
    "Candidates",
    "Capability",
    "Catalogue",
    "Component",
    "Dataset",
    "DatasetFiles",
    "DelayedFeedback",
    "EmbeddingMethod",
    "Encoder",
    "EventLog",
    "InputSpec",
    "Inputs",
    "InterestModel",
    "LogReader",
    "LogRecord",
    "Loss",
    "Memory",
    "PluginOptions",
    "Ranker",
    "Reranker",
    "Retriever",
    "Sampler",
    "ScoreRequest",
    "Scorer",
    "Scores",
    "SourceContext",
    "StateStore",
    "UserState",
]
