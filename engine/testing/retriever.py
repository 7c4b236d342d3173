"""The contract of retrievers."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engine.components import Retriever
from engine.testing.contract import Contract, Options

DIM = 16
SIZE = 500


def check_retriever(cls: type[Retriever], options: Options = None, *, min_recall: float = 0.9) -> None:
    """Recall against brute force, order, filters, changes, saving, searching while upserting.

    min_recall: share of the true best 10 that must be found; an approximate index may be given less.
    """
    contract = Contract("retrievers", cls, options)
    random = np.random.default_rng(0)
    ids = random.permutation(10 * SIZE)[:SIZE].astype(np.int64)
    vectors = random.standard_normal((SIZE, DIM)).astype(np.float32)
    queries = random.standard_normal((20, DIM)).astype(np.float32)
    index = _made(contract)
    found, scores = _search(contract, index, queries, 5)
    contract.holds((found == -1).all() and np.isneginf(scores).all(), "must find nothing (-1, -inf) before it is built")
    with contract.when("in build"):
        index.build(ids, vectors)
    found, scores = _search(contract, index, queries, 10)
    truth = ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :10]]
    recall = np.mean([len(np.intersect1d(f, t)) / 10 for f, t in zip(found, truth, strict=True)])
    contract.holds(recall >= min_recall, f"must find {min_recall:.0%} of the true best 10; found {recall:.0%}")
    _search(contract, index, queries[:0], 10)
    found, scores = _search(contract, index, queries[:2], SIZE + 5)
    contract.holds((found[:, -5:] == -1).all(), "must fill with -1 where k is more than there is")
    _filters(contract, index, queries, ids)
    _kept(contract, index, queries)
    _changes(contract, index, ids)
    _while_upserting(contract, index, queries)
    stats = index.stats()
    contract.holds({"size", "dim", "bytes"} <= set(stats), "must tell size, dim and bytes in `stats`")


def _made(contract: Contract) -> Any:
    with contract.when("when it was made"):
        return contract.cls(DIM, contract.options)


def _search(
    contract: Contract, index: Any, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    with contract.when(f"searching {len(queries)} queries for {k}"):
        found, scores = index.search(queries, k, allowed)
    shape = (len(queries), k)
    contract.holds(found.shape == shape and found.dtype == np.int64, f"must give ids as int64 {shape}")
    contract.holds(scores.shape == shape and scores.dtype == np.float32, f"must give scores as float32 {shape}")
    later = np.where(np.isneginf(scores), np.float32(-3e38), scores)
    contract.holds((np.diff(later, axis=1) <= 0).all(), "must give scores in descending order")
    contract.holds(((found == -1) == np.isneginf(scores)).all(), "must give -1 where the score is -inf, and only there")
    for row in found:
        real = row[row >= 0]
        contract.holds(len(np.unique(real)) == len(real), "must not give an id twice for one query")
    return found, scores


def _filters(contract: Contract, index: Any, queries: np.ndarray, ids: np.ndarray) -> None:
    allowed = np.append(ids[::50], 10**9)
    found, _ = _search(contract, index, queries, 20, allowed)
    contract.holds(np.isin(found[found >= 0], allowed).all(), "must return allowed ids only")
    contract.holds((found >= 0).sum() == len(queries) * 10, "must find all of ten allowed ids when asked for twenty")
    found, _ = _search(contract, index, queries, 3, np.empty(0, np.int64))
    contract.holds((found == -1).all(), "must find nothing where nothing is allowed")


def _kept(contract: Contract, index: Any, queries: np.ndarray) -> None:
    before = _search(contract, index, queries, 10)
    with tempfile.TemporaryDirectory() as folder:
        other = _made(contract)
        with contract.when("in save and load"):
            index.save(Path(folder))
            other.load(Path(folder))
        after = _search(contract, other, queries, 10)
        contract.holds(np.array_equal(before[0], after[0]), "must find the same ids after save and load")
        contract.holds(np.allclose(before[1], after[1], atol=1e-5), "must give the same scores after save and load")
        with contract.when("upserting into a loaded index"):
            other.upsert(np.array([77_777]), queries[:1] * 100)
        found, _ = _search(contract, other, queries[:1], 1)
        contract.holds(found[0, 0] == 77_777, "must find what was upserted into a loaded index")


def _changes(contract: Contract, index: Any, ids: np.ndarray) -> None:
    query = np.zeros((1, DIM), np.float32)
    query[0, 0] = 1.0
    far = query * 1000
    with contract.when("in upsert"):
        index.upsert(np.array([99_999]), far)
    found, scores = _search(contract, index, query, 2)
    contract.holds(found[0, 0] == 99_999, "must find a new item as soon as `upsert` returns")
    contract.holds(abs(scores[0, 0] - 1000) < 50, "must score by inner product")
    with contract.when("in upsert of an id that is there"):
        index.upsert(np.array([99_999, ids[0]]), np.concatenate([-far, far * 2]))
    found, _ = _search(contract, index, query, 2)
    contract.holds(found[0, 0] == ids[0], "must use the new vector of an id that is upserted again")
    contract.holds(99_999 not in found[0], "must forget the old vector of an id that is upserted again")
    with contract.when("in delete, also of an id that is not there"):
        index.delete(np.array([ids[0], 123_456_789]))
    found, _ = _search(contract, index, query, 5)
    contract.holds(ids[0] not in found[0], "must not find what was deleted")


def _while_upserting(contract: Contract, index: Any, queries: np.ndarray) -> None:
    faults: list[BaseException] = []
    stop = threading.Event()

    def search() -> None:
        try:
            while not stop.is_set():
                _search(contract, index, queries, 10)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    random = np.random.default_rng(1)
    try:
        with contract.when("in upsert while others search"):
            for _ in range(50):
                fresh = random.integers(0, 3 * SIZE, 8)
                fresh = np.unique(fresh).astype(np.int64)
                index.upsert(fresh, random.standard_normal((len(fresh), DIM)).astype(np.float32))
                index.delete(fresh[:2])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if faults:
        raise AssertionError(f"{contract.label} must be safe to search while upserting: {faults[0]}") from faults[0]
