"""Quality on MovieLens: DIN beside the mean of the history and the items' own means, on paired seeds.

MovieLens-100k split by time (oldest 80 % train) and by the last 20 % of each user; MovieLens-1M, users 1-2999, by the
last 20 % of each user, where `PLEXRANK_DATA` holds it. Label: rating >= 4. Histories hold positives strictly earlier.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lines import Report, arguments, one_thread

one_thread()

from benchmarks.runs import CONFIGS, Measured, mean_of, run, spread  # noqa: E402
from engine import metrics  # noqa: E402

FIGURES = ("auc", "logloss", "gauc", "raw_logloss")


@dataclass(frozen=True)
class Case:
    """A data set and its split. at_least, above, at_most: figure -> bound on DIN's mean; where the bounds come from."""

    name: str
    config: Path
    overrides: Mapping[str, Any]
    source: str
    at_least: Mapping[str, float] = field(default_factory=dict)
    above: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    most_seeds: int = 5


KNOWN_USERS = {
    "data.split.by": "user_tail",
    "data.split.validation": 0.1,
    "data.split.test": 0.2,
    "interest.options.scale": 0.02,
    "training.epochs": 12,
    "training.optimizer.schedule": "constant",
    "training.optimizer.embedding_lr": 0.05,
    "training.early_stopping.patience": 2,
}
"""The test's users are those of training: vectors of users and items may learn for longer."""

CASES = (
    Case(
        "ml-100k time",
        CONFIGS / "movielens-100k.yaml",
        {},
        source="FuxiCTR's DIN: mean AUC .711 on these rows, a hand-written loop .7156; the item mean's GAUC: .709",
        at_least={"auc": 0.714, "gauc": 0.709},
        at_most={"logloss": 0.615},
        published={"fuxictr_din_auc": 0.711, "hand_written_loop_auc": 0.7156, "logistic_regression_auc": 0.6907},
    ),
    Case(
        "ml-100k last 20 % of each user",
        CONFIGS / "movielens-100k.yaml",
        KNOWN_USERS,
        source="one-hot logistic regression has an AUC of .7718",
        above={"auc": 0.7718},
        published={"logistic_regression_auc": 0.7718, "logistic_regression_logloss": 0.5890},
    ),
    Case(
        "ml-1m users 1-2999, last 20 % of each user",
        CONFIGS / "movielens-1m.yaml",
        {},
        source="one-hot logistic regression has an AUC of .7868; the item mean's GAUC is .711",
        at_least={"auc": 0.795},
        above={"gauc": 0.711},
        published={"logistic_regression_auc": 0.7868, "logistic_regression_logloss": 0.5635},
        most_seeds=3,
    ),
)
QUICK = {"training.epochs": 1}


def judge(case: Case, din: Mapping[str, float | None]) -> tuple[str, bool]:
    """The targets as text, and whether all are met."""
    bounds = (("at_least", ">=", case.at_least), ("above", ">", case.above), ("at_most", "<=", case.at_most))
    text, met = [], []
    for _, sign, figures in bounds:
        for name, bound in figures.items():
            value = din[name]
            text.append(f"{name} {sign} {bound}")
            met.append(
                value is not None
                and (value >= bound if sign == ">=" else value > bound if sign == ">" else value <= bound)
            )
    return ", ".join(text), all(met)


def item_mean(one: Measured) -> dict[str, float | None]:
    """Each item's mean label in training, smoothed by ten ratings at the overall mean, scores the test rows."""
    task, test = next(iter(one.run.scored.items()))
    assert test.items is not None
    labels, items = [], []
    for batch in one.batches("train"):
        labels.append(batch.labels[task].numpy())
        items.append(batch.item_key.numpy())
    y, keys = np.concatenate(labels), np.concatenate(items)
    known, place = np.unique(keys, return_inverse=True)
    rate = float(y.mean())
    means = (np.bincount(place, y) + 10 * rate) / (np.bincount(place) + 10)
    found = np.minimum(np.searchsorted(known, test.items), len(known) - 1)
    scores = np.where(known[found] == test.items, means[found], rate)
    truth = test.labels
    return {
        "auc": metrics.auc(truth, scores),
        "logloss": metrics.logloss(truth, scores),
        "gauc": metrics.gauc(truth, scores, test.users),
    }


def named(case: Case, interest: str) -> dict[str, Any]:
    """The interest model by name; another one than the configuration's loses its options."""
    return {} if interest == "din" else {"interest": {"name": interest}}


def compare(report: Report, case: Case, seeds: int, quick: bool) -> None:
    runs: dict[str, list[Measured]] = {"din": [], "mean": []}
    for seed in range(1, seeds + 1):
        for interest, done in runs.items():
            one = run(case.config, {**case.overrides, **(QUICK if quick else {}), **named(case, interest)}, seed)
            done.append(one)
            shown = {name: round(one.figures[name] or 0, 4) for name in FIGURES}
            report.tell(f"{case.name}: {interest}, seed {seed}: {shown}")
    means = {name: mean_of(done, *FIGURES) for name, done in runs.items()}
    aucs = {name: [r.figures["auc"] for r in done] for name, done in runs.items()}
    differences = [a - b for a, b in zip(aucs["din"], aucs["mean"], strict=True)]
    target, ok = judge(case, means["din"])
    report.line(
        case.name,
        ours=means["din"],
        peer={"mean_interest": means["mean"], "item_mean": item_mean(runs["din"][0]), **case.published},
        target=f"{target} ({case.source})",
        ok=ok,
        seeds=seeds,
        auc_sd=spread(aucs["din"]),
        aucs=aucs["din"],
        din_minus_mean={"mean": float(np.mean(differences)), "sd": spread(differences)},
        best_epochs=[r.figures["best_epoch"] for r in runs["din"]],
    )


def main(argv: Sequence[str] | None = None) -> int:
    cases = {"--only": {"default": "", "help": "run only the cases whose name contains this text"}}
    options = arguments(__doc__ or "", argv, seeds=5, extra=cases)
    report = Report("quality_movielens", quick=options.quick)
    for case in CASES:
        if options.only not in case.name:
            continue
        if "1m" in case.config.stem and not _has_1m():
            report.skip(case.name, "PLEXRANK_DATA does not name a folder that holds ml-1m (ratings*.dat)")
            continue
        compare(report, case, min(options.seeds, case.most_seeds), options.quick)
    return report.end()


def _has_1m() -> bool:
    folder = os.environ.get("PLEXRANK_DATA")
    return bool(folder) and any(Path(folder, "ml-1m").glob("ratings*.dat*"))


if __name__ == "__main__":
    sys.exit(main())
