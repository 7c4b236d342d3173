"""The contract of rankers."""

from __future__ import annotations

import torch

from engine.components import Inputs, InputSpec, Ranker
from engine.testing.contract import Contract, Options

FIELDS = {"user": 8, "item.id": 16, "interest": 4}
ROWS = 6


def check_ranker(cls: type[Ranker], options: Options = None) -> None:
    """Fields of unequal widths with and without dense columns, one task and two, gradients, determinism, reloading."""
    contract = Contract("rankers", cls, options)
    for dense in (3, 0):
        for tasks in (["click"], ["click", "conversion"]):
            _check(contract, InputSpec(fields=FIELDS, dense=dense, from_request=frozenset({"user"})), tasks)


def _check(contract: Contract, spec: InputSpec, tasks: list[str]) -> None:
    torch.manual_seed(0)
    what = f"with {spec.dense} dense columns and {len(tasks)} task(s)"
    with contract.when(f"when it was made {what}"):
        model = contract.cls(spec, tasks, contract.options)
    model.train()
    inputs = _inputs(spec, ROWS)
    leaves = {f"field '{name}'": field.requires_grad_() for name, field in inputs.fields.items()}
    if spec.dense:
        leaves["the dense columns"] = inputs.dense.requires_grad_()
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    with contract.when(f"in a training step {what}"):
        logits = model(inputs)
    _shapes(contract, logits, tasks, ROWS)
    contract.holds(
        all(torch.equal(before[name], leaf) for name, leaf in leaves.items()), "must not change the tensors it is given"
    )
    weights = torch.linspace(0.5, 1.5, ROWS)
    contract.gradients(sum((weights * logits[t]).square().sum() for t in tasks), leaves, model)
    model.eval()
    with torch.no_grad():
        inputs = _inputs(spec, ROWS)
        once, twice = model(inputs), model(inputs)
        _shapes(contract, once, tasks, ROWS)
        for rows in (1, 0):
            with contract.when(f"in evaluation on {rows} row(s)"):
                few = model(_inputs(spec, ROWS, rows))
            _shapes(contract, few, tasks, rows)
            for task in tasks:
                contract.equal(
                    few[task], once[task][:rows], "must not let one row's logit depend on the others in evaluation"
                )
        other = contract.cls(spec, tasks, contract.options)
        contract.reloads(model, other)
        again = other(inputs)
        for task in tasks:
            contract.equal(once[task], twice[task], "must answer the same twice in evaluation", 0)
            contract.equal(
                once[task], again[task], "must give the same logits after its state is loaded into another instance"
            )


def _inputs(spec: InputSpec, rows: int, first: int | None = None) -> Inputs:
    random = torch.Generator().manual_seed(3)
    fields = {name: torch.randn(rows, width, generator=random) for name, width in spec.fields.items()}
    dense = torch.randn(rows, spec.dense, generator=random)
    if first is None:
        return Inputs(fields=fields, dense=dense)
    return Inputs(fields={name: field[:first] for name, field in fields.items()}, dense=dense[:first])


def _shapes(contract: Contract, logits: object, tasks: list[str], rows: int) -> None:
    contract.holds(
        isinstance(logits, dict) and list(logits) == tasks, f"must give logits by task for {tasks}, in this order"
    )
    assert isinstance(logits, dict)
    for task in tasks:
        contract.floats(logits[task], (rows,), f"the logits of task '{task}'")
