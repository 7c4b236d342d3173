"""Feature multiplexing on MovieLens-100k (last 20 % of each user) at 50, 10 and 2 % of the full tables' bytes.

Beside `unified` with 1, 2 and 4 lookups stand: `full` (one row an id), a *fair* hash a feature (vocabularies of up to
32 ids keep a row an id, the rest share the budget), and the control that every compression has to be held against: the
same bytes by narrower vectors. On a vocabulary as small as this one the control wins; multiplexing's case is that it
needs no pass over the vocabulary, takes ids that nobody has seen yet, has one knob, and goes below one number an id.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

from benchmarks.runs import Measured, mean_of, run, spread  # noqa: E402

CONFIG = Path(__file__).parent / "configs" / "multiplexing-100k.yaml"
COLLISION_FREE = 32
WIDTHS = {0.5: 8, 0.1: 2, 0.02: 1}
"""Share of the bytes -> width of the control. A width cannot be less than 1: 6.6 % is the least that it can reach."""


def fair_hash(ratio: float) -> dict[str, Any]:
    return {
        "embedding.name": "hashing",
        "embedding.options.ratio": ratio,
        "embedding.options.collision_free_below": COLLISION_FREE,
    }


def unified(ratio: float, lookups: int) -> dict[str, Any]:
    return {
        "embedding.name": "unified",
        "embedding.options.ratio": ratio,
        "embedding.options.lookups": lookups,
    }


class Table:
    """Runs each variant on the same seeds, once."""

    def __init__(self, report: Report, seeds: int, quick: bool) -> None:
        self.report, self.seeds = report, seeds
        self.common = {"training.epochs": 1} if quick else {}

    def measure(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        runs: list[Measured] = []
        for seed in range(1, self.seeds + 1):
            runs.append(run(CONFIG, {**self.common, **overrides}, seed))
            self.report.tell(f"{name}, seed {seed}: AUC {runs[-1].figures['auc']:.4f}")
        means = mean_of(runs, "auc", "gauc", "logloss", "embedding_bytes")
        return {**means, "auc_sd": spread([r.figures["auc"] for r in runs])}


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__ or "", argv, seeds=3)
    report = Report("multiplexing", quick=options.quick)
    table = Table(report, options.seeds, options.quick)
    full = table.measure("full", {})
    report.line("full", ours=full, seeds=options.seeds)
    for ratio in (0.5,) if options.quick else (0.5, 0.1, 0.02):
        share = f"{ratio:.0%}"
        hashed = table.measure(f"{share} hash", fair_hash(ratio))
        narrow = table.measure(f"{share} narrower", {"embedding.dim": WIDTHS[ratio]})
        for lookups in (1,) if options.quick else (1, 2, 4):
            ours = table.measure(f"{share} unified, {lookups} lookups", unified(ratio, lookups))
            target, ok = judge(ratio, lookups, ours["auc"], hashed["auc"], full["auc"])
            report.line(
                f"unified, {lookups} lookups, {share} of the bytes",
                ours=ours,
                peer={"fair_hash": hashed, "same_bytes_by_narrower_width": narrow, "full": full},
                ratio=ours["embedding_bytes"] / full["embedding_bytes"],
                target=target,
                ok=ok,
                better_than_hash=ours["auc"] - hashed["auc"],
                below_full=full["auc"] - ours["auc"],
                better_than_narrower=ours["auc"] - narrow["auc"],
                seeds=options.seeds,
            )
    return report.end()


def judge(ratio: float, lookups: int, ours: float, hashed: float, full: float) -> tuple[str | None, bool | None]:
    """The targets: one lookup at half the memory, four at a tenth."""
    if (ratio, lookups) == (0.5, 1):
        return "AUC >= fair hash + .02", ours - hashed >= 0.02
    if (ratio, lookups) == (0.1, 4):
        return "AUC >= fair hash + .06 and >= full - .02", ours - hashed >= 0.06 and full - ours <= 0.02
    return None, None


if __name__ == "__main__":
    sys.exit(main())
