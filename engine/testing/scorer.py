"""The contract of scorers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.bundle import Bundle
from engine.components import Scorer, ScoreRequest
from engine.errors import BundleError, DeltaGap, RequestError
from engine.inference.signature import CANDIDATES, VERSION, Signature
from engine.inference.tensors import encode
from engine.streaming.deltas.apply import TABLES
from engine.streaming.deltas.delta import Delta, TableRows
from engine.streaming.learning.recalibration import PREFIX
from engine.testing.contract import Contract, Options
from engine.training.calibration import Calibration


def check_scorer(cls: type[Scorer], options: Options = None, *, bundle: Path) -> None:
    """Probabilities for any number of items, explanations, health, a bad bundle that changes nothing; row deltas that
    change scores and version, and those that do not follow or fit, which change nothing. One that answers tensors
    (`infer`) answers them as it scores.

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
    if type(scorer).infer is not Scorer.infer:
        _check_tensors(contract, scorer, opened, [request, replace(request, items=[*some, "no such item"])])
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
    _check_deltas(contract, scorer, bundle, request, tasks)


def _check_tensors(contract: Contract, scorer: Scorer, bundle: Bundle, requests: list[ScoreRequest]) -> None:
    """What it answers to tensors is what it scores, and a request that does not fit is told which tensor."""
    with contract.when("asked for its signature"):
        signature = scorer.signature
    contract.holds(signature == Signature.of(bundle.schema), "must have the signature of the bundle's schema")
    for request in [*requests, replace(requests[0], items=[])]:
        for items_apart in (False, True):
            _answers_as_scored(contract, scorer, bundle, request, items_apart=items_apart)
    tensors = encode(requests[0], bundle.encoder, bundle.catalogue, items_apart=False)
    prints = tensors.pop(CANDIDATES)
    for what, wrong in {
        "no candidates": {},
        "candidates of another type": {CANDIDATES: prints.astype(np.int32)},
        "a tensor that is not there": {CANDIDATES: prints, "no such tensor": prints},
    }.items():
        try:
            scorer.infer(tensors | wrong)
        except RequestError:
            continue
        except Exception as error:
            contract.fails(f"must refuse {what} with RequestError, not {type(error).__name__}")
        contract.fails(f"must refuse {what}")


def _answers_as_scored(
    contract: Contract, scorer: Scorer, bundle: Bundle, request: ScoreRequest, *, items_apart: bool
) -> None:
    tasks = list(bundle.schema.tasks)
    with contract.when("answering tensors"):
        wanted = scorer.score(request)
        found = scorer.infer(encode(request, bundle.encoder, bundle.catalogue, items_apart=items_apart))
    contract.holds(sorted(found) == sorted([*tasks, VERSION]), f"must answer {tasks} and '{VERSION}' to tensors")
    for task in tasks:
        contract.holds(
            found[task].dtype == np.float32 and found[task].shape == (len(request.items),),
            f"must answer task '{task}' as float32 [{len(request.items)}]",
        )
        contract.holds(
            np.allclose(found[task], wanted.tasks[task], atol=1e-5, rtol=0), "must answer tensors as it scores"
        )
    contract.holds(
        found[VERSION].dtype == np.uint8 and found[VERSION].tobytes().decode() == wanted.version,
        f"must say in '{VERSION}' which version scored",
    )


def _check_deltas(contract: Contract, scorer: Scorer, path: Path, request: ScoreRequest, tasks: list[str]) -> None:
    bundle = Bundle.open(path)
    state = bundle.frozen_tensors()
    tables = {n.removeprefix(TABLES): t for n, t in state.items() if n.startswith(TABLES)}
    dense = {n: t for n, t in state.items() if not n.startswith("embedding.") and t.is_floating_point()}

    def delta(sequence: int = 1, **changes: Any) -> Delta:
        parts: dict[str, Any] = {"model": bundle.name, "base": bundle.version, "epoch": 1, "sequence": sequence}
        return Delta(**(parts | {"created": 0.0, "newest": 0.0, "tables": {}} | changes))

    every = {n: TableRows(np.arange(len(t)), t.numpy() * np.float32(-3.0)) for n, t in tables.items()}
    contract.holds(
        scorer.version == bundle.version, f"must name the bundle's version {bundle.version} once it is loaded"
    )
    first = _score(contract, scorer, request, tasks)
    with contract.when("applying a delta"):
        scorer.apply(delta(1, tables=every, dense={n: t * 2.0 for n, t in dense.items() if "running_" not in n}))
    moved = _score(contract, scorer, request, tasks)
    contract.holds(
        any(not np.array_equal(first[t], moved[t]) for t in tasks), "must score with a delta's rows and tensors"
    )
    _stands_at(contract, scorer, request, delta(1).version)
    if type(scorer).infer is not Scorer.infer:
        _answers_as_scored(contract, scorer, bundle, request, items_apart=False)
    with contract.when("applying a delta again"):
        scorer.apply(delta(1, tables={n: TableRows(p.rows, p.values * 9) for n, p in every.items()}))
    wrong: list[tuple[str, Delta, type[BundleError]]] = [
        ("another bundle's delta", delta(2, base="0" * 12), DeltaGap),
        ("a delta behind a missing one", delta(3), DeltaGap),
        ("a delta of a chain that was left", delta(2, epoch=0), DeltaGap),
        ("another model's delta", delta(2, model="not-this-one"), BundleError),
        ("a table that is not there", delta(2, tables={"no table": _rows(1, 4)}), BundleError),
        ("a tensor that is not there", delta(2, dense={"no.tensor": torch.zeros(1)}), BundleError),
    ]
    for name, table in tables.items():
        rows, width = table.shape
        beyond = TableRows(np.array([rows]), np.zeros((1, width), np.float32))
        nan = TableRows(np.array([0]), np.full((1, width), np.nan, np.float32))
        wrong.append((f"rows of another width in '{name}'", delta(2, tables={name: _rows(1, width + 1)}), BundleError))
        wrong.append((f"a row beyond '{name}'", delta(2, tables={name: beyond}), BundleError))
        wrong.append((f"NaN in '{name}'", delta(2, tables={name: nan}), BundleError))
    for name, tensor in [*dense.items()][:1]:
        wrong.append((f"NaN in '{name}'", delta(2, dense={name: tensor * torch.nan}), BundleError))
    for what, bad, kind in wrong:
        _refuses(contract, scorer, what, bad, kind)
        after = _score(contract, scorer, request, tasks)
        contract.holds(all(np.array_equal(moved[t], after[t]) for t in tasks), f"must score as before after {what}")
        _stands_at(contract, scorer, request, delta(1).version)
    with contract.when("applying the next delta"):
        scorer.apply(delta(2, tables=every))
    _stands_at(contract, scorer, request, delta(2).version)
    even = Calibration("platt", np.array([0, 1], np.float32), np.array([0, 1e-6], np.float32), 1e-6)
    named = {name: value for task in tasks for name, value in even.to_tensors(f"{PREFIX}{task}.").items()}
    with contract.when("applying a delta with calibrations"):
        scorer.apply(delta(3, dense=named))
    evened = _score(contract, scorer, request, tasks)
    contract.holds(
        all(np.allclose(evened[t], 0.5, atol=0.01) for t in tasks), "must calibrate by what a delta says of it"
    )
    with contract.when("in load, after deltas"):
        scorer.load(path)
    again = _score(contract, scorer, request, tasks)
    contract.holds(
        all(np.allclose(first[t], again[t], atol=1e-6) for t in tasks), "must leave deltas behind when it loads"
    )
    _stands_at(contract, scorer, request, bundle.version)


def _rows(count: int, width: int) -> TableRows:
    return TableRows(np.arange(count), np.zeros((count, width), np.float32))


def _stands_at(contract: Contract, scorer: Scorer, request: ScoreRequest, version: str) -> None:
    with contract.when("asked for its version"):
        found = {scorer.version, scorer.score(request).version}
    contract.holds(found == {version}, f"must say {version} in `version` and in its scores, not {sorted(found)}")


def _refuses(contract: Contract, scorer: Scorer, what: str, delta: Delta, kind: type[BundleError]) -> None:
    try:
        scorer.apply(delta)
    except BundleError as error:
        contract.holds(
            isinstance(error, DeltaGap) == (kind is DeltaGap),
            f"must refuse {what} with {kind.__name__}, not {type(error).__name__}: at a gap the bundle is loaded",
        )
    except Exception as error:
        contract.fails(f"must refuse {what} with {kind.__name__}, not {type(error).__name__}")
    else:
        contract.fails(f"must refuse {what}")


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
