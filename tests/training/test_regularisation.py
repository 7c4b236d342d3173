"""Mini-batch aware L2 against a computation by hand."""

from __future__ import annotations

import numpy as np
import torch

from engine.batch import keyed_jagged
from engine.data.statistics import IdStatistics
from engine.hashing import fingerprints
from engine.schema import FeatureSpec
from engine.training.distributed import World
from engine.training.regularisation import MiniBatchAwareL2
from plugins.embedding.full import FullEmbedding

ALONE = World(0, 1, torch.device("cpu"))


def test_each_distinct_id_of_the_batch_shrinks_by_lambda_over_its_count_however_often_it_occurs() -> None:
    """Items a, b, c with counts 10, 4, 1; the batch has a twice as target and once in a history, b in a history.

    Gradient by hand, lambda = .3: row a .3/10 w, row b .3/4 w, row c and the unknown row nothing.
    """
    features = [FeatureSpec(name="item", dim=4), FeatureSpec(name="hist", kind="sequence", of="item", dim=4)]
    prints = fingerprints("abc")
    order = np.argsort(prints)
    statistics = {"item": IdStatistics(prints[order], np.array([10, 4, 1])[order])}
    method = FullEmbedding(features, FullEmbedding.Options(init=1.0), statistics)
    a, b, _ = prints
    ids = keyed_jagged({"item": (np.array([a, a]), None), "hist": (np.array([b, a]), np.array([2, 0]))})
    MiniBatchAwareL2(features, statistics, 0.3, ALONE).penalty(ids, method(ids)).backward()
    (weight,) = method.parameters()
    assert weight.grad is not None
    row = {text: 1 + int(np.searchsorted(prints[order], p)) for text, p in zip("abc", prints, strict=True)}
    torch.testing.assert_close(weight.grad[row["a"]], 0.03 * weight[row["a"]].detach())
    torch.testing.assert_close(weight.grad[row["b"]], 0.075 * weight[row["b"]].detach())
    assert not weight.grad[row["c"]].any()
    assert not weight.grad[0].any()


def test_ids_without_a_count_are_taken_as_seen_once() -> None:
    """An id of a history that was never a target: gradient lambda / 1 w."""
    features = [FeatureSpec(name="item", dim=4)]
    known = {"item": IdStatistics(np.sort(fingerprints("ab")), np.array([5, 5]))}
    method = FullEmbedding(features, FullEmbedding.Options(), known)
    torch.nn.init.constant_(next(method.parameters()), 2.0)
    ids = keyed_jagged({"item": (fingerprints("z"), None)})
    counted = {"item": IdStatistics(np.empty(0, np.int64), np.empty(0, np.int64))}
    for statistics in (known, counted):
        method.zero_grad()
        MiniBatchAwareL2(features, statistics, 0.5, ALONE).penalty(ids, method(ids)).backward()
        gradient = next(method.parameters()).grad
        assert gradient is not None
        assert torch.equal(gradient[0], torch.full((4,), 1.0)), "half of two, in the unknown row"
