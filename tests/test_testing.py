"""Every built-in keeps the contract of its kind, and the contract tests find those that do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine import testing
from engine.components import KINDS, Candidates, CandidateSource, InterestModel, PluginOptions, Ranker
from engine.model import mean_pool
from engine.plugins import installed
from engine.train_command import run_training
from plugins.events.local import LocalEventLog
from plugins.losses.bce import BinaryCrossEntropy
from plugins.retrieval.exact import ExactRetriever
from plugins.state.sqlite import SqliteStateStore

CHECKS: dict[str, Callable[..., None]] = {
    "embeddings": testing.check_embedding,
    "interests": testing.check_interest,
    "rankers": testing.check_ranker,
    "encoders": testing.check_encoder,
    "retrievers": testing.check_retriever,
    "candidate_sources": testing.check_source,
    "rerankers": testing.check_reranker,
    "losses": testing.check_loss,
    "delayed_feedback": testing.check_delayed_feedback,
    "samplers": testing.check_sampler,
    "datasets": testing.check_dataset,
    "event_logs": testing.check_event_log,
    "state_stores": testing.check_state_store,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "rerankers.cap": {"attribute": "genres"},
    "datasets.synthetic": {"users": 50, "items": 30, "impressions": 2000},
}
BROUGHT = {"datasets.movielens-1m", "datasets.criteo"}
"""Datasets whose files must be brought."""
ELSEWHERE = {"state_stores.redis", "event_logs.kafka", "event_logs.kafka-fast"}
"""Need a server: tests/state, tests/events."""


def builtins() -> list[Any]:
    own = [(i.kind, i.name) for i in installed().table() if i.kind in CHECKS and i.distribution == "plexrank"]
    return [pytest.param(k, n, id=f"{k}.{n}") for k, n in own if f"{k}.{n}" not in ELSEWHERE]


@pytest.mark.parametrize(("kind", "name"), builtins())
def test_a_built_in_keeps_the_contract_of_its_kind(kind: str, name: str) -> None:
    if f"{kind}.{name}" in BROUGHT and "PLEXRANK_DATA" not in os.environ:
        pytest.skip("its files are found under PLEXRANK_DATA, which is not set")
    CHECKS[kind](installed().get(kind, name), OPTIONS.get(f"{kind}.{name}"))


def test_every_kind_has_its_check() -> None:
    assert set(CHECKS) | {"scorers"} == set(KINDS)


def test_the_scorer_in_process_keeps_its_contract(films: Any, tmp_path: Path) -> None:
    run_training(films.config(training={"epochs": 1, "threads": 1}), tmp_path)
    testing.check_scorer(installed().get("scorers", "inproc"), bundle=tmp_path / "bundle")


class Honest(InterestModel):
    """The mean of the history, told plainly; what the broken ones below are made from."""

    name = "honest"

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        return mean_pool(history)[user_of_target]

    def explain(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> JaggedTensor:
        parts = [history.to_dense()[u] for u in user_of_target.tolist()]
        return JaggedTensor(
            values=torch.cat([torch.full((len(p), 1), 1 / max(1, len(p))) for p in parts]),
            lengths=torch.tensor([len(p) for p in parts]),
        )


class PadsWithOnes(Honest):
    """Gives ones to a user without history."""

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        out = super().forward(targets, history, user_of_target)
        return torch.where((history.lengths() == 0)[user_of_target].unsqueeze(1), 1.0, out)


class ForgetsWhoAsks(Honest):
    """Right in training, where user and target go together; wrong in serving."""

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        means = mean_pool(history)
        return means[torch.arange(len(targets)) % len(means)]


class KeepsAWeightAside(Honest):
    """Has a weight that no state_dict knows."""

    def __init__(self, dim: int, options: PluginOptions) -> None:
        super().__init__(dim, options)
        self.weights = [torch.randn(dim)]

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        return super().forward(targets, history, user_of_target) * self.weights[0]


class Doubles(Honest):
    """Answers in float64."""

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        return super().forward(targets, history, user_of_target).double()


class Overwrites(Honest):
    """Changes the history that it is given."""

    def forward(self, targets: Tensor, history: JaggedTensor, user_of_target: Tensor) -> Tensor:
        with torch.no_grad():
            history.values().mul_(2)
        return super().forward(targets, history, user_of_target)


def test_an_honest_interest_passes() -> None:
    testing.check_interest(Honest)


@pytest.mark.parametrize(
    ("cls", "clause"),
    [
        (PadsWithOnes, "must give zeros"),
        (ForgetsWhoAsks, "as it does for each target with a copy of its user's history"),
        (KeepsAWeightAside, "register what is learned"),
        (Doubles, "as float32, not torch.float64"),
        (Overwrites, "must not change the tensors"),
    ],
)
def test_a_broken_interest_is_named_with_the_clause_it_breaks(cls: type[InterestModel], clause: str) -> None:
    with pytest.raises(AssertionError) as error:
        testing.check_interest(cls)
    assert clause in str(error.value)
    assert "interests.honest" in str(error.value)
    assert cls.__name__ in str(error.value)


class LooseOptions(BaseModel):
    width: int = 1


def test_options_that_swallow_typing_errors_are_found() -> None:
    class Lax(PluginOptions, extra="ignore"):
        pass

    broken = type("Lenient", (Honest,), {"Options": Lax, "__doc__": "Takes any option."})
    with pytest.raises(AssertionError, match="must refuse an option that it does not have"):
        testing.check_interest(broken)
    strange = type("Strange", (Honest,), {"Options": LooseOptions, "__doc__": "Has options of its own kind."})
    with pytest.raises(AssertionError, match="derived from PluginOptions"):
        testing.check_interest(strange)


def test_a_plugin_of_another_kind_and_one_that_raises_are_told() -> None:
    with pytest.raises(AssertionError, match="must be a subclass of Ranker"):
        testing.check_ranker(Honest)

    class Raises(Ranker):
        """Raises."""

        name = "raises"

        def forward(self, inputs: Any) -> dict[str, Tensor]:
            raise KeyError("age")

    with pytest.raises(AssertionError, match=r"rankers\.raises .* raised KeyError in a training step .*age"):
        testing.check_ranker(Raises)


class Rises(CandidateSource):
    """Gives the worst first."""

    name = "rises"

    def candidates(self, user: Any, request: Any, k: int) -> Candidates:
        rows = np.arange(min(k, len(self.context.catalogue)), dtype=np.int64)
        return Candidates(rows, rows.astype(np.float32))


class Generous(CandidateSource):
    """Gives more than it is asked for."""

    name = "generous"

    def candidates(self, user: Any, request: Any, k: int) -> Candidates:
        rows = np.arange(len(self.context.catalogue), dtype=np.int64)
        return Candidates(rows, np.zeros(len(rows), np.float32))


def test_broken_sources_are_told_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="scores must not rise"):
        testing.check_source(Rises)
    with pytest.raises(AssertionError, match="at most the 1 items asked for, not 40"):
        testing.check_source(Generous)


class IgnoresDeletes(ExactRetriever):
    """Keeps what was deleted."""

    def delete(self, ids: np.ndarray) -> None:
        pass


def test_a_retriever_that_keeps_what_was_deleted_is_found() -> None:
    with pytest.raises(AssertionError, match="must not find what was deleted"):
        testing.check_retriever(IgnoresDeletes)


class SumsUp(BinaryCrossEntropy):
    """Forgets the weights."""

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **context: Tensor) -> Tensor:
        return super().forward(logits, labels)


def test_a_loss_that_forgets_weights_is_found() -> None:
    with pytest.raises(AssertionError, match="must not learn from rows of weight zero"):
        testing.check_loss(SumsUp)


class LosesTheFirst(LocalEventLog):
    """Never gives the first record."""

    def read(self, positions: Any, limit: int = 1000) -> Any:
        return super().read({p: max(1, at) for p, at in positions.items()}, limit)


def test_a_log_that_loses_a_record_is_found() -> None:
    with pytest.raises(AssertionError, match="must give back each event"):
        testing.check_event_log(LosesTheFirst)


class RemembersTheErased(SqliteStateStore):
    """Says that it forgets."""

    def delete(self, user: str) -> bool:
        return True


def test_a_store_that_does_not_forget_is_found() -> None:
    with pytest.raises(AssertionError, match="must know nothing of an erased user"):
        testing.check_state_store(RemembersTheErased)
