"""The contract of embedding methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.batch import keyed_jagged
from engine.components import EmbeddingMethod
from engine.data.statistics import IdStatistics
from engine.hashing import fingerprints
from engine.schema import FeatureSpec
from engine.testing.contract import Contract, Options

FEATURES = [
    FeatureSpec(name="user_id", side="user", dim=8),
    FeatureSpec(name="item_id", dim=8),
    FeatureSpec(name="genre.tags", kind="multi", dim=4),
    FeatureSpec(name="history", kind="sequence", of="item_id", dim=8),
    FeatureSpec(name="hour", side="context", dim=2),
]
VOCABULARY = {"user_id": 60, "item_id": 100, "genre.tags": 12, "hour": 24}


def check_embedding(cls: type[EmbeddingMethod], options: Options = None) -> None:
    """One vector a value, shared spaces, unknown ids, empty histories, gradients, the frozen form, memory, rows."""
    contract = Contract("embeddings", cls, options)
    method = _made(contract)
    widths = method.widths
    contract.holds(set(widths) == {f.name for f in FEATURES}, "must give the width of every feature in `widths`")
    contract.holds(widths["history"] == widths["item_id"], "must give features of one space one width")
    method.train()
    ids = _batch(users=6, targets=6)
    with contract.when("on a batch"):
        found = method(ids)
    _shapes(contract, ids, found, widths)
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    contract.holds(parameters, "must have parameters to train")
    spread = [v.values() * torch.linspace(0.5, 1.5, v.values().numel()).view_as(v.values()) for v in found.values()]
    total = torch.stack([part.sum() for part in spread]).sum()
    contract.gradients(total, {f"parameter {n}": p for n, p in parameters.items()}, method, every=False)
    method.eval()
    with torch.no_grad():
        _values(contract, method, widths)
        _frozen(contract, method, widths)
    _accounts(contract, method, ids)


def _made(contract: Contract) -> Any:
    torch.manual_seed(0)
    statistics = {}
    if contract.cls.wants_statistics(contract.options):
        for space, size in VOCABULARY.items():
            prints = np.sort(fingerprints(range(size)))
            statistics[space] = IdStatistics(prints, np.arange(1, size + 1, dtype=np.int64))
    with contract.when("when it was made"):
        return contract.cls(FEATURES, contract.options, statistics)


def _batch(users: int, targets: int, *, empty: bool = False) -> KeyedJaggedTensor:
    """Ids of the vocabulary and some that are not in it; the first row of jagged features is empty."""
    random = np.random.default_rng(3)
    columns: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for feature in FEATURES:
        rows = users if feature.from_request else targets
        size = VOCABULARY[feature.space] + 5
        if not feature.is_jagged:
            columns[feature.name] = (fingerprints(random.integers(0, size, rows)), None)
            continue
        lengths = np.zeros(rows, np.int64) if empty else np.arange(rows) % 4
        columns[feature.name] = (fingerprints(random.integers(0, size, lengths.sum())), lengths)
    return keyed_jagged(columns)


def _shapes(
    contract: Contract, ids: KeyedJaggedTensor, found: Mapping[str, JaggedTensor], widths: Mapping[str, int]
) -> None:
    contract.holds(set(found) == set(ids.keys()), "must give vectors for every feature of the batch, and no other")
    for name, part in ids.to_dict().items():
        contract.floats(found[name].values(), (len(part.values()), widths[name]), f"the vectors of '{name}'")
        contract.holds(
            torch.equal(found[name].lengths().long(), part.lengths().long()), f"must keep the lengths of '{name}'"
        )


def _values(contract: Contract, method: EmbeddingMethod, widths: Mapping[str, int]) -> None:
    """Serving's strides, empty histories, one id one vector."""
    for what, ids in (
        ("with one request and many targets", _batch(1, 9)),
        ("without any history", _batch(4, 4, empty=True)),
        ("without targets", _batch(1, 0)),
    ):
        with contract.when(what):
            found = method(ids)
        _shapes(contract, ids, found, widths)
    ids = _batch(6, 6)
    found = method(ids)
    again = method(ids)
    for name in widths:
        contract.equal(found[name].values(), again[name].values(), "must look up the same twice in evaluation", 0)
    _shared(contract, method)


def _shared(contract: Contract, method: EmbeddingMethod) -> None:
    """An id has one vector, as a target and in a history, whatever else is in the batch."""
    prints = fingerprints(range(20))

    def look_up(items: np.ndarray, history: np.ndarray) -> tuple[Tensor, Tensor]:
        n = len(items)
        columns: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
            "user_id": (fingerprints([1] * n), None),
            "item_id": (items, None),
            "genre.tags": (np.empty(0, np.int64), np.zeros(n, np.int64)),
            "history": (history, np.array([len(history)] + [0] * (n - 1))),
            "hour": (fingerprints([2] * n), None),
        }
        found = method(keyed_jagged(columns))
        return found["item_id"].values(), found["history"].values()

    target, history = look_up(prints, prints[::-1].copy())
    contract.equal(target, history.flip(0), "must give an id one vector in all features of its space", 0)
    alone, _ = look_up(prints[5:6], prints[:0])
    contract.equal(target[5:6], alone, "must give an id one vector, whatever else is in the batch", 1e-6)
    contract.holds(len(torch.unique(target, dim=0)) > 1, "must tell ids apart")


def _frozen(contract: Contract, method: EmbeddingMethod, widths: Mapping[str, int]) -> None:
    with contract.when("in freeze"):
        frozen = method.freeze().eval()
    clause = "must answer frozen as it does in evaluation"
    for ids in (_batch(6, 6), _batch(1, 9), _batch(1, 0)):
        with contract.when("in the frozen form"):
            found = frozen(ids)
        _shapes(contract, ids, found, widths)
        expected = method(ids)
        for name in widths:
            contract.equal(found[name].values(), expected[name].values(), clause, 1e-6)
    other = _made(contract).freeze().eval()
    with contract.when("loading the frozen form's state"):
        other.load_state_dict(frozen.state_dict(), assign=True)
    ids = _batch(6, 6)
    for name, vectors in other(ids).items():
        contract.equal(vectors.values(), frozen(ids)[name].values(), "must be whole in the frozen form's state", 0)


def _accounts(contract: Contract, method: EmbeddingMethod, ids: KeyedJaggedTensor) -> None:
    with contract.when("in memory_bytes"):
        memory = method.memory_bytes()
    contract.holds(memory.training > 0 and memory.inference > 0, "must measure its bytes in training and inference")
    with contract.when("in touched_rows"):
        touched = method.touched_rows(ids)
    for table, rows in touched.items():
        contract.holds(
            rows.dtype == torch.int64 and rows.ndim == 1, f"must give the touched rows of '{table}' as int64 [n]"
        )
        contract.holds(len(rows.unique()) == len(rows), f"must give each touched row of '{table}' once")
