"""The contract of rerankers."""

from __future__ import annotations

import numpy as np

from engine.components import Reranker, SourceContext
from engine.testing.contract import Contract, Options
from engine.testing.world import tiny_context


def check_reranker(cls: type[Reranker], options: Options = None, *, context: SourceContext | None = None) -> None:
    """Positions of the ranked list, none twice, at most k, for unknown items and empty lists, with rules that fit.

    context: what the reranker sees; by default `tiny_context()`, whose items have title, genres, brand and price.
    """
    contract = Contract("rerankers", cls, options)
    context = context or tiny_context()
    with contract.when("when it was made"):
        reranker = cls(contract.options, context)
    random = np.random.default_rng(2)
    shuffled = random.permutation(len(context.catalogue))
    with_unknown = shuffled.copy()
    with_unknown[::6] = -1
    for rows in (shuffled, with_unknown, np.full(5, -1), shuffled[:1], shuffled[:0]):
        rows = rows.astype(np.int64)
        scores = np.sort(random.random(len(rows)).astype(np.float32))[::-1].copy()
        for k in (1, 10, len(rows) + 5):
            _check(contract, reranker, rows, scores, k)


def _check(contract: Contract, reranker: Reranker, rows: np.ndarray, scores: np.ndarray, k: int) -> None:
    before = rows.copy(), scores.copy()
    with contract.when(f"re-ordering {len(rows)} items for {k}"):
        positions, rules = reranker.rerank(rows, scores, k)
    contract.holds(np.array_equal(rows, before[0]) and np.array_equal(scores, before[1]), "must not change its input")
    contract.holds(
        isinstance(positions, np.ndarray) and positions.ndim == 1 and positions.dtype == np.int64,
        "must give positions as int64 [n]",
    )
    contract.holds(len(positions) <= k, f"must give at most the {k} positions asked for, not {len(positions)}")
    contract.holds(((positions >= 0) & (positions < len(rows))).all(), "must give positions of the list it was given")
    contract.holds(len(np.unique(positions)) == len(positions), "must not give a position twice")
    chosen = set(positions.tolist())
    contract.holds(
        all(p in chosen and isinstance(rule, str) and rule for p, rule in rules.items()),
        "must name its rules (text) for positions that it returns",
    )
    again, _ = reranker.rerank(rows, scores, k)
    contract.holds(np.array_equal(positions, again), "must re-order the same list the same way")
