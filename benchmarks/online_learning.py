"""Whether learning from the stream pays: progressive AUC of the learner beside that of the bundle it began with.

    python -m benchmarks.online_learning [--quick] [--seeds N] [--plots runs/online]

A model is trained on the early half of a log; the later rows come as events, in the order of time, and `plexrank
learn` scores each example before it trains on it. The frozen bundle scores the same examples. Two worlds: the synthetic
service with drift, and MovieLens-1M (users 1 to 2,999; skipped where the files are not there). Curves are plotted in
`learning.html` of each run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import torch  # noqa: E402

from benchmarks.runs import CONFIGS  # noqa: E402
from benchmarks.stream_events import events, write  # noqa: E402
from engine.errors import DataError  # noqa: E402
from engine.loading import load_config  # noqa: E402
from engine.plugins import Plugins, installed  # noqa: E402
from engine.streaming.events.open_log import open_log  # noqa: E402
from engine.streaming.learning.learner import Learner  # noqa: E402
from engine.train_command import run_training  # noqa: E402

HALF = {"data.split.by": "time", "data.split.validation": 0.1, "data.split.test": 0.5}
WORLDS: dict[str, dict[str, Any]] = {
    "synthetic": {"data.dataset.options.impressions": 200_000, "data.dataset.options.drift": 1.0},
    "movielens-1m": {"serving.positive_interactions": ["like"]},
}
MOST = {"synthetic": None, "movielens-1m": 200_000}
"""Rows that are streamed, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    plots = {"--plots": {"type": Path, "default": Path("runs/online"), "help": "folder of the curves"}}
    options = arguments(__doc__ or "", argv, seeds=3, extra=plots)
    report = Report("online_learning", quick=options.quick)
    torch.set_num_threads(1)
    plugins = installed()
    for name in WORLDS:
        try:
            found = [
                _one(report, name, seed, options.plots / f"{name}-{seed}", plugins, quick=options.quick)
                for seed in range(1, options.seeds + 1)
            ]
        except DataError as error:
            report.tell(f"{name} is skipped: {error}")
            continue
        ours, frozen = ([f[which] for f in found] for which in ("auc", "base"))
        report.line(
            f"progressive AUC, {name}",
            ours=fmean(ours),
            peer=fmean(frozen),
            ratio=fmean(ours) / fmean(frozen),
            target="above the frozen bundle's",
            ok=fmean(ours) > fmean(frozen),
            seeds=[round(a - b, 4) for a, b in zip(ours, frozen, strict=True)],
            logloss={"learner": fmean(f["logloss"] for f in found), "frozen": fmean(f["base_logloss"] for f in found)},
            last_window={"learner": found[-1]["late"], "frozen": found[-1]["base_late"]},
            examples=found[-1]["examples"],
            curves=str(options.plots),
        )
    return report.end()


def _one(report: Report, name: str, seed: int, out: Path, plugins: Plugins, *, quick: bool) -> dict[str, Any]:
    config = load_config(
        CONFIGS / f"{name}.yaml", {**HALF, **WORLDS[name], "seed": seed, "training.threads": 1}, plugins
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report.tell(f"{name}, seed {seed}: training on the early half")
        bundle = Path(run_training(config, folder / "run", plugins=plugins)["bundle"])
        log = open_log(plugins, config.serving.event_log, folder / "state")
        most = 5_000 if quick else MOST[name]
        count = write(log, events(config, plugins, folder / "cache", after=0.5, most=most))
        report.tell(f"{name}, seed {seed}: learning from {count:,} events")
        learner = Learner(config, log, out, plugins=plugins, bundle=bundle, start="earliest")
        try:
            figures = learner.run("end")["figures"]
        finally:
            learner.close()
            log.close()
    last = next(iter(figures["tasks"].values()))
    since, base = last["since_start"], last["since_start"]["base"]
    return {
        "auc": since["auc"],
        "base": base["auc"],
        "logloss": since["logloss"],
        "base_logloss": base["logloss"],
        "late": last["auc"],
        "base_late": last["base"]["auc"],
        "examples": figures["examples"],
    }


if __name__ == "__main__":
    sys.exit(main())
