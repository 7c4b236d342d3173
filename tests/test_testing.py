"""Every built-in keeps the contract of its kind, and the contract tests find those that do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine import testing
from engine.components import Candidates, CandidateSource, InterestModel, PluginOptions, Ranker
from engine.plugins import installed

CHECKS: dict[str, Callable[..., None]] = {
    "embeddings": testing.check_embedding,
    "interests": testing.check_interest,
    "rankers": testing.check_ranker,
    "encoders": testing.check_encoder,
    "retrievers": testing.check_retriever,
    "candidate_sources": testing.check_source,
    "rerankers": testing.check_reranker,
    "losses": testing.check_loss,
    "samplers": testing.check_sampler,
    "datasets": testing.check_dataset,
    "event_logs": testing.check_event_log,
    "state_stores": testing.check_state_store,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "rerankers.cap": {"attribute": "genres"},
    "datasets.synthetic": {"users": 50, "items": 30, "impressions": 2000},
}
ELSEWHERE = {
    "datasets.movielens-100k": "needs the network; tests/datasets",
    "datasets.movielens-1m": "needs files; tests/datasets",
    "datasets.criteo": "needs files; tests/datasets",
    "state_stores.redis": "needs a server; tests/state",
}


def builtins() -> list[Any]:
    own = [(i.kind, i.name) for i in installed().table() if i.kind in CHECKS and i.distribution == "plexrank"]
    return [pytest.param(kind, name, id=f"{kind}.{name}") for kind, name in own]


@pytest.mark.parametrize(("kind", "name"), builtins())
def test_a_built_in_keeps_the_contract_of_its_kind(kind: str, name: str) -> None:
    if f"{kind}.{name}" in ELSEWHERE:
        pytest.skip(ELSEWHERE[f"{kind}.{name}"])
    CHECKS[kind](installed().get(kind, name), OPTIONS.get(f"{kind}.{name}"))
