"""The contract of encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.components import Encoder, Inputs, InputSpec
from engine.testing.contract import Contract, Options

USER = InputSpec(fields={"user": 8, "history": 16}, dense=2, from_request=frozenset({"user", "history"}))
ITEM = InputSpec(fields={"item.id": 16}, dense=0)


def check_encoder(cls: type[Encoder], options: Options = None) -> None:
    """Shapes of both sides, one vector or several an item, gradients, determinism, reloading."""
    contract = Contract("encoders", cls, options)
    torch.manual_seed(0)
    with contract.when("when it was made"):
        model = cls(USER, ITEM, contract.options)
    dim = model.output_dim
    contract.holds(isinstance(dim, int) and dim > 0, "must set `output_dim` to the width of the common space")
    model.train()
    user, item = _inputs(USER, 5, 1), _inputs(ITEM, 7, 2)
    leaves = {f"user field '{n}'": f.requires_grad_() for n, f in user.fields.items()}
    leaves |= {f"item field '{n}'": f.requires_grad_() for n, f in item.fields.items()}
    leaves["the user's dense columns"] = user.dense.requires_grad_()
    users, items = _both(contract, model, user, item)
    best = torch.einsum("ud,mvd->umv", users, items if items.ndim == 3 else items.unsqueeze(1)).amax(2)
    spread = torch.linspace(-1, 1, best.numel()).view_as(best)
    contract.gradients((best * spread).sum(), leaves, model)
    model.eval()
    with torch.no_grad():
        user, item = _inputs(USER, 5, 1), _inputs(ITEM, 7, 2)
        users, items = _both(contract, model, user, item)
        contract.equal(users, model.users(user), "must encode a user the same twice in evaluation", 0)
        contract.equal(items, model.items(item), "must encode an item the same twice in evaluation", 0)
        for rows in (1, 0):
            with contract.when(f"in evaluation on {rows} row(s)"):
                few = model.users(_inputs(USER, 5, 1, rows)), model.items(_inputs(ITEM, 7, 2, rows))
            contract.equal(few[0], users[:rows], "must not let one user's vector depend on the others in evaluation")
            contract.equal(few[1], items[:rows], "must not let one item's vector depend on the others in evaluation")
        other = cls(USER, ITEM, contract.options)
        contract.reloads(model, other)
        contract.equal(
            users, other.users(user), "must give the same vectors after its state is loaded into another instance"
        )


def _both(contract: Contract, model: Any, user: Inputs, item: Inputs) -> tuple[Tensor, Tensor]:
    with contract.when("encoding users"):
        users = model.users(user)
    with contract.when("encoding items"):
        items = model.items(item)
    contract.floats(users, (5, model.output_dim), "users")
    contract.holds(isinstance(items, Tensor) and items.ndim in (2, 3), "must give items as [M, D] or [M, V, D]")
    middle = tuple(items.shape[1:-1])
    contract.floats(items, (7, *middle, model.output_dim), "items")
    return users, items


def _inputs(spec: InputSpec, rows: int, seed: int, first: int | None = None) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    fields = {name: torch.randn(rows, width, generator=random)[:first] for name, width in spec.fields.items()}
    return Inputs(fields=fields, dense=torch.randn(rows, spec.dense, generator=random)[:first])
