"""One training run from a configuration to a bundle and a report; what `plexrank train` calls."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.bundle import Bundle, check_free, write_bundle
from engine.bundle.manifest import library_versions
from engine.config import Config
from engine.data.prepare import prepare
from engine.data.prepared import Prepared
from engine.errors import BundleError
from engine.model import RankingModel
from engine.plugins import Plugins, installed
from engine.training.baselines import TrainingCounts, baselines, counts
from engine.training.calibration import Calibration
from engine.training.distributed import join
from engine.training.evaluation import Predictions
from engine.training.loop import TrainResult, peak_rss_mb, train
from engine.training.report import Buckets, Scored, task_figures, write_report
from engine.training.retrieval import RetrievalResult, train_retrieval

Progress = Callable[[str, float], None]

CHECKED_ROWS = 256
"""Rows that the written bundle must score as the trained model does."""
TOLERANCE = 1e-6


@dataclass
class Run:
    """What a run made, before it is written: compare reads the figures and the model, `write` keeps them.

    figures: `auc, gauc, logloss, ne, ece` of the ranking task on the test part (validation where there is no test),
    `logloss` and `ece` after calibration, `raw_logloss` and `raw_ece` before; `tasks`, `baselines`, `retrieval`,
    `history`, `rows_per_second`, `seconds`, `peak_rss_mb`, `parameters`, `embedding_bytes` and more.
    """

    config: Config
    prepared: Prepared
    model: RankingModel
    calibration: dict[str, Calibration]
    retrieval: RetrievalResult | None
    figures: dict[str, Any]
    scored: dict[str, Scored]
    seen: TrainingCounts
    optimizer: dict[str, Tensor] | None = None


def run_training(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> dict[str, Any]:
    """Prepares, trains, calibrates, trains retrieval if configured, and writes `out/bundle`, `out/report.html` and
    `out/metrics.json`; checkpoints lie in `out/checkpoints`.

    A bundle of an earlier run in `out` makes way once the new one is whole. resume: go on from the newest checkpoint.
    -> `Run.figures` with `version`, `bundle` and `report`. Under torchrun all processes train and the first one does
    the rest; the others return {}.
    """
    plugins = installed() if plugins is None else plugins
    tell = progress or (lambda stage, share: None)
    out = Path(out).absolute()
    check_free(out / "bundle", replace=True)
    plugins.enable(config.plugins)
    out.mkdir(parents=True, exist_ok=True)
    prepared = prepare(config, plugins, progress=progress)
    run = train_run(config, prepared, out, plugins=plugins, resume=resume, progress=progress)
    if run is None:
        return {}
    tell("writing the bundle", 0.0)
    bundle = write(run, out / "bundle", plugins)
    tell("writing the bundle", 1.0)
    figures = {**run.figures, "version": bundle.version, "bundle": str(bundle.path), "report": str(out / "report.html")}
    write_report(
        out / "report.html",
        config=config,
        figures=figures,
        history=run.figures["history"],
        scored=run.scored,
        buckets=_buckets(run),
        versions=_versions(bundle),
    )
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    plugins.notify("on_publish", bundle=bundle.path, manifest=bundle.manifest.as_json())
    return figures


def train_run(
    config: Config,
    prepared: Prepared,
    out: Path,
    *,
    plugins: Plugins,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run | None:
    """Trains and measures; only checkpoints are written. None in every process of torchrun but the first."""
    start = time.perf_counter()
    result = train(config, prepared, out, plugins=plugins, resume=resume, progress=progress)
    retrieval = None
    if config.retrieval is not None:
        retrieval = train_retrieval(config, prepared, plugins=plugins, progress=progress)
    if join().rank > 0:
        return None
    calibration = calibrate(config, result.validation)
    judged = result.test if result.test is not None else result.validation
    scored = _scored(judged, calibration)
    seen = TrainingCounts.of(prepared)
    figures = _figures(config, prepared, result, scored)
    task = prepared.schema.tasks[0]
    figures["baselines"] = baselines(seen, judged, task) if judged is not None else {}
    figures["calibration"] = {t: c.describe() for t, c in calibration.items()}
    figures["retrieval"] = dict(retrieval.metrics) if retrieval is not None else None
    figures["peak_rss_mb"] = peak_rss_mb()
    figures["total_seconds"] = time.perf_counter() - start
    return Run(config, prepared, result.model, calibration, retrieval, _plain(figures), scored, seen, result.optimizer)


def calibrate(config: Config, validation: Predictions | None) -> dict[str, Calibration]:
    """Each task's calibration, fitted on the validation part; `none` where there is none."""
    kind = config.training.calibration
    tasks = config.schema_().tasks
    if validation is None:
        return {task: Calibration() for task in tasks}
    return {task: Calibration.fit(validation.logits[task], validation.labels[task], kind) for task in tasks}


def write(run: Run, path: Path, plugins: Plugins) -> Bundle:
    """Writes the bundle, having proved that it scores as the model in memory does."""
    return write_bundle(
        path,
        config=run.config,
        model=run.model,
        prepared=run.prepared,
        calibration=run.calibration,
        metrics=run.figures,
        retrieval=run.retrieval,
        optimizer=run.optimizer,
        replace=True,
        prove=lambda bundle: _prove(run, bundle.model(plugins)),
        plugins=plugins,
    )


@torch.inference_mode()
def _prove(run: Run, again: RankingModel) -> None:
    """The model read back scores as the one in memory, to 1e-6; BundleError if it does not."""
    for batch in islice(run.prepared.batches(_judged(run.prepared), CHECKED_ROWS), 1):
        expected, found = run.model(batch), again(batch)
        for task, logits in expected.items():
            gap = float((logits - found[task]).abs().max())
            if not gap <= TOLERANCE:
                raise BundleError(
                    f"scores of task '{task}' read back differ by {gap:.3g} from the trained model's: embedding "
                    f"'{run.config.embedding.name}', ranker '{run.config.ranker.name}' or the interest model keeps "
                    "state outside its state_dict"
                )


def _judged(prepared: Prepared) -> str:
    return next((s for s in ("test", "validation") if prepared.rows.get(s)), "train")


def _scored(judged: Predictions | None, calibration: Mapping[str, Calibration]) -> dict[str, Scored]:
    if judged is None:
        return {}
    users, items = judged.user_key, judged.item_key
    return {
        task: Scored(labels, judged.logits[task], calibration[task].apply(judged.logits[task]), users, items)
        for task, labels in judged.labels.items()
    }


def _figures(config: Config, prepared: Prepared, result: TrainResult, scored: Mapping[str, Scored]) -> dict[str, Any]:
    tasks = {task: task_figures(rows) for task, rows in scored.items()}
    main = tasks.get(prepared.schema.tasks[0], dict.fromkeys(("auc", "gauc", "logloss", "ne", "ece")))
    return {
        **result.metrics,
        **main,
        "tasks": tasks,
        "judged_on": _judged(prepared),
        "rows": dict(prepared.rows),
        "label_rate": prepared.label_rate,
        "seed": config.seed,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _buckets(run: Run) -> list[Buckets]:
    judged = next(iter(run.scored.values()), None)
    if judged is None:
        return []
    found = []
    if judged.users is not None:
        found.append(Buckets("user activity (training rows)", counts(run.seen.users, judged.users)))
    if judged.items is not None:
        found.append(Buckets("item popularity (training rows)", counts(run.seen.impressions, judged.items)))
    return found


def _versions(bundle: Bundle) -> dict[str, str]:
    plugins = {f"{p.kind}.{p.name}": f"{p.distribution} {p.version}" for p in bundle.manifest.plugins}
    machine = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return {**library_versions(), **machine, "cores": str(os.cpu_count()), **plugins}


def _plain(value: Any) -> Any:
    """Numbers as JSON has them; what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
