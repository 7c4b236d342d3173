"""The contract of scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle import Bundle
from engine.components import Scorer, ScoreRequest
from engine.errors import BundleError
from engine.testing.contract import Contract, Options


def check_scorer(cls: type[Scorer], options: Options = None, *, bundle: Path) -> None:
    """Probabilities for any number of items, explanations, health, and a bad bundle that changes nothing.

    bundle: a bundle to score with, as `plexrank train` writes.
    """
    contract = Contract("scorers", cls, options)
    with contract.when("when it was made"):
        scorer = cls(contract.options)
    with contract.when("in load"):
        scorer.load(bundle)
    opened = Bundle.open(bundle)
    tasks = list(opened.schema.tasks)
    some = opened.catalogue.ids(np.arange(min(5, len(opened.catalogue))))
    history = {opened.schema.item: some[:2]} if opened.schema.item else {}
    for items in (some, some[:1], ["no such item"], some * 40):
        _score(contract, scorer, ScoreRequest(user={}, history=history, items=items), tasks)
    _score(contract, scorer, ScoreRequest(user={}, history={}, items=some), tasks)
    request = ScoreRequest(user={}, history=history, items=some)
    before = _score(contract, scorer, request, tasks)
    with contract.when("in explain"):
        weights = scorer.explain(request)
    for name, values in weights.items():
        contract.holds(
            values.ndim == 2 and len(values) == len(some) and values.dtype == np.float32 and np.isfinite(values).all(),
            f"must explain '{name}' by finite float32 weights [N, H]",
        )
    with contract.when("in health"):
        scorer.health()
    try:
        scorer.load(bundle.parent / "there-is-no-such-bundle")
    except BundleError:
        pass
    except Exception as error:
        contract.fails(f"must refuse a bundle that is not there with BundleError, not {type(error).__name__}")
    else:
        contract.fails("must refuse a bundle that is not there")
    after = _score(contract, scorer, request, tasks)
    for task in tasks:
        contract.holds(
            np.array_equal(before[task], after[task]), "must go on with the old bundle when a new one is refused"
        )


def _score(contract: Contract, scorer: Scorer, request: ScoreRequest, tasks: list[str]) -> dict[str, np.ndarray]:
    with contract.when(f"scoring {len(request.items)} item(s)"):
        scores: Any = scorer.score(request)
    contract.holds(list(scores.tasks) == tasks, f"must score the tasks {tasks}, in this order")
    for task, values in scores.tasks.items():
        contract.holds(
            values.dtype == np.float32 and values.shape == (len(request.items),),
            f"must give task '{task}' as float32 [{len(request.items)}]",
        )
        contract.holds(
            np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all(), "must give probabilities"
        )
    contract.holds(scores.model and scores.version, "must say which model and version scored")
    return scores.tasks
