"""The exact retriever against brute force, and while it changes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engine.errors import BundleError
from plugins.retrieval.exact import ExactRetriever

DIM = 8


def made(block: int = 65_536) -> ExactRetriever:
    return ExactRetriever(DIM, ExactRetriever.Options(block=block))


def brute(ids, vectors, queries, k):
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1)[:, :k]
    return ids[order], np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("block", [1, 7, 100, 65_536])
def test_search_finds_what_brute_force_finds_whatever_the_block(block: int) -> None:
    random = np.random.default_rng(0)
    ids = random.permutation(10_000)[:300].astype(np.int64)
    vectors = random.normal(size=(300, DIM)).astype(np.float32)
    queries = random.normal(size=(11, DIM)).astype(np.float32)
    index = made(block)
    index.build(ids, vectors)
    found, scores = index.search(queries, 10)
    expected, expected_scores = brute(ids, vectors, queries, 10)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    allowed = ids[::4]
    found, _ = index.search(queries, 10, allowed)
    np.testing.assert_array_equal(found, brute(allowed, vectors[::4], queries, 10)[0])


def test_any_mixture_of_changes_ends_as_if_built_anew() -> None:
    random = np.random.default_rng(1)
    index, truth = made(), {}
    for _ in range(200):
        ids = np.unique(random.integers(0, 400, 20)).astype(np.int64)
        if random.random() < 0.3:
            index.delete(ids)
            for i in ids.tolist():
                truth.pop(i, None)
        else:
            vectors = random.normal(size=(len(ids), DIM)).astype(np.float32)
            index.upsert(ids, vectors)
            truth.update(zip(ids.tolist(), vectors, strict=True))
    ids, vectors = np.array(list(truth)), np.stack(list(truth.values()))
    queries = random.normal(size=(5, DIM)).astype(np.float32)
    found, _ = index.search(queries, 20)
    np.testing.assert_array_equal(found, brute(ids, vectors, queries, 20)[0])
    stats = index.stats()
    assert stats["size"] == len(truth)
    assert stats["dead"] <= stats["size"]  # dead rows are dropped before they are more than the live ones


def test_a_search_sees_whole_upserts_only() -> None:
    """One writer moves all items together, from one corner to the other; no search may see some here and some there."""
    corners = np.zeros((2, DIM), np.float32)
    corners[0, 0], corners[1, 1] = 1.0, 1.0
    ids = np.arange(50)
    index = made(block=16)
    index.build(ids, np.repeat(corners[:1], 50, axis=0))
    torn, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            found, scores = index.search(corners, 50)
            if sorted(found[0].tolist()) != ids.tolist() or len(np.unique(scores[0])) != 1:
                torn.append((found, scores))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(300):
        index.upsert(ids, np.repeat(corners[[step % 2]], 50, axis=0))
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_a_loaded_index_is_mapped_and_still_takes_changes(tmp_path) -> None:
    random = np.random.default_rng(2)
    ids, vectors = np.arange(30), random.normal(size=(30, DIM)).astype(np.float32)
    first = made()
    first.build(ids, vectors)
    first.delete(ids[:5])
    first.save(tmp_path)
    second = made()
    second.load(tmp_path)
    queries = random.normal(size=(3, DIM)).astype(np.float32)
    np.testing.assert_array_equal(second.search(queries, 30)[0], first.search(queries, 30)[0])
    second.upsert(np.array([999]), queries[:1] * 50)
    assert second.search(queries[:1], 1)[0].tolist() == [[999]]
    third = made()
    third.load(tmp_path)
    assert 999 not in third.search(queries, 30)[0]  # the file was not written to


def test_a_bad_file_and_bad_vectors_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(BundleError, match=r"exact\.safetensors"):
        made().load(tmp_path)
    (tmp_path / "exact.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(BundleError, match="cannot be read"):
        made().load(tmp_path)
    bad = np.ones((2, DIM), np.float32)
    bad[1, 3] = np.nan
    with pytest.raises(ValueError, match="id 8 is not finite"):
        made().upsert(np.array([7, 8]), bad)
    with pytest.raises(ValueError, match="twice"):
        made().build(np.array([7, 7]), np.ones((2, DIM), np.float32))
    with pytest.raises(ValueError, match=r"wanted \[2, 8\]"):
        made().build(np.array([7, 8]), np.ones((2, 5), np.float32))


def test_searches_under_changes_find_whole_items_and_none_that_is_gone() -> None:
    """Items come, move and go, so that the table grows and is tidied up; an item's vector says whose it is: its place
    in the first column, a length of one. A search may miss what has just changed, but finds nothing that never was."""
    index, stop, wrong = made(block=32), threading.Event(), []
    queries = np.zeros((2, DIM), np.float32)
    queries[:, 0] = 1.0, -1.0

    def vectors(ids: np.ndarray, turn: int) -> np.ndarray:
        of = np.zeros((len(ids), DIM), np.float32)
        of[:, 0] = ids / 1000.0
        of[:, 1 + turn % (DIM - 1)] = 1.0
        return of

    always = np.arange(0, 1000, 50)
    index.build(always, vectors(always, 0))

    def look() -> None:
        while not stop.is_set():
            found, scores = index.search(queries, 400)
            for ids, values, sign in zip(found, scores, (1.0, -1.0), strict=True):
                ids, values = ids[ids >= 0], values[ids >= 0]
                if len(np.unique(ids)) < len(ids) or not np.allclose(values, sign * ids / 1000.0, atol=1e-6):
                    wrong.append((ids, values))
            if not np.isin(always, found[0]).all():
                wrong.append(found)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    random = np.random.default_rng(3)
    for turn in range(400):
        coming = np.setdiff1d(np.unique(random.integers(0, 300, 20)), always)
        index.upsert(coming, vectors(coming, turn))
        index.upsert(always, vectors(always, turn))
        index.delete(random.permutation(coming)[:10])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong, wrong[:2]
