"""The contract of interest models."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from engine.components import InterestModel
from engine.testing.contract import Contract, Options

DIM = 8
LENGTHS = (3, 0, 1, 7, 2)


def check_interest(cls: type[InterestModel], options: Options = None) -> None:
    """Shapes, empty histories, several targets a user, gradients, determinism, explanations, reloading."""
    contract = Contract("interests", cls, options)
    torch.manual_seed(0)
    with contract.when("when it was made"):
        model = cls(DIM, contract.options)
    contract.holds(isinstance(model.output_dim, int) and model.output_dim > 0, "must set `output_dim` to its width K")
    _training(contract, model)
    model.eval()
    with torch.no_grad():
        _one_target_a_user(contract, model)
        _many_targets(contract, model)
        _no_history(contract, model)
        _explanations(contract, model)
        other = cls(DIM, contract.options)
        contract.reloads(model, other)
        targets, history, users = _world()
        contract.equal(
            model(targets, history, users),
            other(targets, history, users),
            "must give the same answer after its state is loaded into another instance (register what is learned as "
            "a parameter or a buffer)",
        )


def _world() -> tuple[Tensor, JaggedTensor, Tensor]:
    """Five users, one target each; the second has no history."""
    random = torch.Generator().manual_seed(1)
    targets = torch.randn(len(LENGTHS), DIM, generator=random)
    values = torch.randn(sum(LENGTHS), DIM, generator=random)
    return targets, JaggedTensor(values=values, lengths=torch.tensor(LENGTHS)), torch.arange(len(LENGTHS))


def _training(contract: Contract, model: InterestModel) -> None:
    model.train()
    targets, history, users = _world()
    values = history.values().requires_grad_()
    targets.requires_grad_()
    before = values.detach().clone(), targets.detach().clone()
    with contract.when("in a training step, with a user without history among the users"):
        out = model(targets, JaggedTensor(values=values, lengths=history.lengths()), users)
    contract.floats(out, (len(LENGTHS), model.output_dim), "the interest")
    contract.holds(
        torch.equal(values, before[0]) and torch.equal(targets, before[1]), "must not change the tensors it is given"
    )
    spread = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    contract.gradients((out * spread).sum(), {"the history": values, "the targets": targets}, model, every=False)
    with contract.when("in a training step where nobody has a history"):
        out = model(targets.detach(), JaggedTensor(values=torch.empty(0, DIM), lengths=torch.zeros(5).long()), users)
        if out.requires_grad:
            out.sum().backward()
    contract.equal(out.detach(), torch.zeros_like(out), "must give zeros in training where nobody has a history")


def _one_target_a_user(contract: Contract, model: InterestModel) -> None:
    targets, history, users = _world()
    out = model(targets, history, users)
    contract.floats(out, (len(LENGTHS), model.output_dim), "the interest in evaluation")
    contract.equal(out, model(targets, history, users), "must answer the same twice in evaluation", 0)
    contract.equal(out[1], torch.zeros(model.output_dim), "must give zeros to a user without history")
    values = history.values()[: LENGTHS[0]]
    alone = model(targets[:1], JaggedTensor(values=values, lengths=torch.tensor(LENGTHS[:1])), users[:1])
    contract.equal(out[:1], alone, "must not let one user's answer depend on the other users in evaluation", 1e-4)


def _many_targets(contract: Contract, model: InterestModel) -> None:
    """Serving (one user) and several users with several targets agree with one target a user."""
    _, history, _ = _world()
    random = torch.Generator().manual_seed(2)
    targets = torch.randn(6, DIM, generator=random)
    parts = history.to_dense()
    for what, users in (("one user", [3] * 6), ("several users", [3, 0, 1, 3, 4, 0])):
        chosen = sorted(set(users))
        given = JaggedTensor.from_dense([parts[u] for u in chosen])
        place = torch.tensor([chosen.index(u) for u in users])
        with contract.when(f"with many targets of {what}"):
            out = model(targets, given, place)
        contract.floats(out, (6, model.output_dim), f"the interest for many targets of {what}")
        repeated = JaggedTensor.from_dense([parts[u] for u in users])
        contract.equal(
            out,
            model(targets, repeated, torch.arange(6)),
            f"must answer for many targets of {what} as it does for each target with a copy of its user's history",
            1e-4,
        )
    with contract.when("without targets"):
        out = model(targets[:0], JaggedTensor.from_dense([parts[3]]), torch.empty(0, dtype=torch.int64))
    contract.floats(out, (0, model.output_dim), "the interest for no targets")


def _no_history(contract: Contract, model: InterestModel) -> None:
    empty = JaggedTensor(values=torch.empty(0, DIM), lengths=torch.zeros(1, dtype=torch.int64))
    with contract.when("for one user without history"):
        out = model(torch.randn(4, DIM), empty, torch.zeros(4, dtype=torch.int64))
    contract.floats(out, (4, model.output_dim), "the interest of a user without history")
    contract.equal(out, torch.zeros_like(out), "must give zeros for one user without history, whatever the targets")


def _explanations(contract: Contract, model: InterestModel) -> None:
    targets, history, users = _world()
    with contract.when("in explain"):
        weights = model.explain(targets, history, users)
    lengths = weights.lengths()
    contract.holds(len(lengths) == len(LENGTHS), "must explain every target: `explain` gives one row a target")
    contract.holds(bool((lengths <= history.lengths()).all()), "must not explain more history items than the user has")
    contract.floats(weights.values(), (int(lengths.sum()), 1), "the weights of `explain`")
