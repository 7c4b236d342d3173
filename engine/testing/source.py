"""The contract of candidate sources."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.components import CandidateSource, SourceContext, UserState
from engine.testing.contract import Contract, Options
from engine.testing.world import tiny_context

REQUEST: Mapping[str, Any] = {"user": "u1", "features": {}, "context": {}, "k": 10}


def check_source(cls: type[CandidateSource], options: Options = None, *, context: SourceContext | None = None) -> None:
    """Rows of the catalogue, best first, none twice, at most k, for users known and unknown.

    context: what the source sees; by default `tiny_context()`, items "1" to "40".
    """
    contract = Contract("candidate_sources", cls, options)
    context = context or tiny_context()
    with contract.when("when it was made"):
        source = cls(contract.options, context)
    known = UserState("u1", {}, ["3", "17", "9"], [300, 200, 100], ["3", "17", "9", "11"])
    strange = UserState("u2", {}, ["no such item"], [1], ["no such item"])
    for what, user in (("a user with a history", known), ("an unknown user", UserState("nobody")), ("odd", strange)):
        for k in (1, 10, len(context.catalogue) + 10):
            before = copy.deepcopy(user)
            with contract.when(f"proposing {k} items to {what}"):
                found = source.candidates(user, REQUEST, k)
            _check(contract, found.rows, found.scores, k, len(context.catalogue))
            contract.holds(user == before, "must not change the user's state")


def _check(contract: Contract, rows: object, scores: object, k: int, items: int) -> None:
    contract.holds(
        isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype == np.int64, "must give rows as int64 [n]"
    )
    contract.holds(isinstance(scores, np.ndarray) and scores.dtype == np.float32, "must give scores as float32 [n]")
    assert isinstance(rows, np.ndarray)
    assert isinstance(scores, np.ndarray)
    contract.holds(scores.shape == rows.shape, "must give one score a row")
    contract.holds(len(rows) <= k, f"must give at most the {k} items asked for, not {len(rows)}")
    contract.holds(((rows >= 0) & (rows < items)).all(), "must give rows of the catalogue and nothing else")
    contract.holds(len(np.unique(rows)) == len(rows), "must not give a row twice")
    contract.holds(np.isfinite(scores).all(), "must give finite scores")
    contract.holds((np.diff(scores) <= 0).all(), "must give the best first: scores must not rise")
