"""The contract of scorers finds those that apply deltas, or answer tensors, carelessly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import testing
from engine.components import ScoreRequest, Scores
from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta
from plugins.scorers.inproc import InprocScorer


class Deaf(InprocScorer):
    """Hears of deltas and goes on as before."""

    def apply(self, delta: Delta) -> None:
        super().apply(replace(delta, tables={}, dense={}))


class Forgetful(InprocScorer):
    """Scores by deltas under the bundle's name."""

    def score(self, request: ScoreRequest) -> Scores:
        scores = super().score(request)
        return replace(scores, version=scores.version.partition("+")[0])


class Careless(InprocScorer):
    """Takes whatever comes, in any order."""

    def apply(self, delta: Delta) -> None:
        chain = self._now().chain
        super().apply(replace(delta, base=chain.base, epoch=chain.epoch, sequence=chain.sequence + 1))


class Vague(InprocScorer):
    """Says of every fault the same."""

    def apply(self, delta: Delta) -> None:
        try:
            super().apply(delta)
        except BundleError as error:
            raise BundleError(str(error)) from None


class Approximate(InprocScorer):
    """Answers tensors by something else than it scores by."""

    def infer(self, tensors: Mapping[str, np.ndarray], *others: Any) -> dict[str, np.ndarray]:
        answer = super().infer(tensors)
        return answer | {"liked": answer["liked"] * np.float32(0.999)}


class Nameless(InprocScorer):
    """Answers tensors under the bundle's name, whatever was applied."""

    def infer(self, tensors: Mapping[str, np.ndarray], *others: Any) -> dict[str, np.ndarray]:
        base = self.version.partition("+")[0]
        return super().infer(tensors) | {"version": np.frombuffer(base.encode(), np.uint8)}


class Lenient(InprocScorer):
    """Passes over tensors that it does not know."""

    def infer(self, tensors: Mapping[str, np.ndarray], *others: Any) -> dict[str, np.ndarray]:
        return super().infer({name: tensors[name] for name in tensors if name in self.signature.by_name})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Approximate, "must answer tensors as it scores"),
        (Nameless, "must say in 'version' which version scored"),
        (Lenient, "must refuse a tensor that is not there"),
        (Deaf, "must score with a delta's rows and tensors"),
        (Forgetful, r"must say \w+\+1\.1 in `version` and in its scores"),
        (Careless, r"must say \w+\+1\.1 in `version`"),
        (Vague, "must refuse another bundle's delta with DeltaGap, not BundleError"),
    ],
)
def test_a_scorer_that_is_careless_is_found(tiny_bundle: Path, cls: type[InprocScorer], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_scorer(cls, bundle=tiny_bundle)


def test_the_scorer_in_process_keeps_the_contract_over_a_table_that_all_share(unified_bundle: Path) -> None:
    testing.check_scorer(InprocScorer, bundle=unified_bundle)
    testing.check_scorer(InprocScorer, {"item_vectors_mb": 0}, bundle=unified_bundle)
