"""The contract of samplers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.components import Sampler
from engine.testing.contract import Contract, Options

ITEMS = 50


def check_sampler(cls: type[Sampler], options: Options = None) -> None:
    """Positives first, rows of the catalogue, log probabilities, the same draws for a seed, also when reseeded."""
    contract = Contract("samplers", cls, options)
    counts = np.arange(ITEMS, dtype=np.int64)[::-1].copy()  # the last was never a positive
    for size in (1, 12):
        positives = torch.arange(size) * 3
        items, log_q = _draw(contract, counts, positives, seed=1)
        contract.holds(torch.equal(items[:size], positives), "must give the positives first, in their order")
        same, _ = _draw(contract, counts, positives, seed=1)
        contract.holds(torch.equal(items, same), "must draw the same for the same seed")
        if len(items) > size + 4:
            other, _ = _draw(contract, counts, positives, seed=2)
            contract.holds(not torch.equal(items, other), "must draw otherwise for another seed")
        contract.holds(bool((log_q <= 1e-5).all()), "must give `log_q` as logs of probabilities, at most 0")
    with contract.when("reseeding"):
        once, often = (cls(contract.options, counts, seed) for seed in (1, 2))
        often.sample(torch.arange(7))
        often.reseed(1)
        first, again = once.sample(torch.arange(5))[0], often.sample(torch.arange(5))[0]
    contract.holds(torch.equal(first, again), "must draw after `reseed` as if made with that seed")
    _draw(contract, np.zeros(ITEMS, dtype=np.int64), torch.arange(4), seed=1)


def _draw(contract: Contract, counts: np.ndarray, positives: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    with contract.when(f"sampling for {len(positives)} positive(s)"):
        sampler = contract.cls(contract.options, counts, seed)
        items, log_q = sampler.sample(positives)
    contract.holds(items.dtype == torch.int64, f"must give items as int64, not {items.dtype}")
    contract.holds(len(items) >= len(positives), "must give at least the positives")
    contract.holds(
        bool(((items >= 0) & (items < len(counts))).all()), "must draw rows of the catalogue and nothing else"
    )
    contract.floats(log_q, (len(items),), "`log_q`")
    return items, log_q
