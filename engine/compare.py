"""Variants of one configuration side by side: the same data, the same seeds, paired differences."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.components import ScoreRequest, UserState
from engine.config import Config
from engine.data.prepare import prepare
from engine.data.prepared import Prepared
from engine.errors import ConfigError
from engine.loading import with_overrides
from engine.plugins import Plugins, installed
from engine.train_command import Run, train_run
from engine.training.charts import row_chart, standalone
from engine.training.report import Section, page, show

Progress = Callable[[str, float], None]

FIGURES = ("auc", "gauc", "logloss", "ece", "embedding_bytes", "rows_per_second", "p50_ms")
PAIRED = ("auc", "gauc", "logloss")
CHARTS = (("auc", "Test AUC"), ("gauc", "Test GAUC"), ("logloss", "Log loss"), ("p50_ms", "p50 of 200, ms"))
CANDIDATES = 200
TIMED_REQUESTS = 100
MOST_VARIANTS = 64


def compare(
    config: Config,
    vary: Mapping[str, Sequence[str]],
    seeds: int,
    out: Path,
    *,
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> list[dict[str, Any]]:
    """Trains every combination of the varied values with `seeds` seeds each (config.seed, config.seed + 1, ...).

    vary: dotted key -> values, as in `{"interest.name": ["mean", "din"], "embedding.name": ["full", "unified"]}`; a
        component given another name loses its options. Retrieval is trained only where one of its keys is varied.
    Writes `out/compare.json` (also every single run), `out/compare.html` and the plot `out/compare.svg`.

    -> rows: first `popularity` (the item mean, where rows have items), then one a variant. Each has `variant`, `seeds`
    and, for each of auc, gauc, logloss, ece, embedding_bytes, rows_per_second and p50_ms (ranking 200 candidates for
    one user in this process, one thread, encoding included), the mean and `<figure>_sd`; and for auc, gauc, logloss
    `<figure>_diff` and `<figure>_diff_se`: the mean difference to the first variant over paired seeds and its standard
    error. What one seed or the data cannot say is None.
    ConfigError for a key or value that the configuration refuses, before anything is trained.
    """
    plugins = installed() if plugins is None else plugins
    tell = progress or (lambda stage, share: None)
    variants = _variants(config, vary, plugins)
    plugins.enable(config.plugins)
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    done, total = 0, len(variants) * seeds
    for seed in range(config.seed, config.seed + seeds):
        for name, variant in variants.items():
            stage = f"run {done + 1} of {total}: {name}, seed {seed}"
            tell(stage, done / total)
            runs[name].append(_one(variant.model_copy(update={"seed": seed}), out / "run", plugins))
            done += 1
            tell(stage, 1.0)
    rows = side_by_side(runs)
    _write(out, config, rows, runs)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Rows as people read them: column names, and cells such as `0.7140 ± 0.0031`."""
    columns = ["variant", "AUC", "GAUC", "log loss", "ECE", "embedding", "rows/s", "p50 of 200", "AUC difference"]
    cells = []
    for row in rows:
        line = [str(row["variant"])]
        line += [_with_spread(row.get(k), row.get(f"{k}_sd"), ".4f") for k in ("auc", "gauc", "logloss", "ece")]
        size = row.get("embedding_bytes")
        line.append("–" if size is None else f"{size / 1024:,.0f} KiB")
        line.append(_with_spread(row.get("rows_per_second"), row.get("rows_per_second_sd"), ",.0f"))
        speed = row.get("p50_ms")
        line.append("–" if speed is None else f"{speed:.2f} ms")
        line.append(_with_spread(row.get("auc_diff"), row.get("auc_diff_se"), "+.4f"))
        cells.append(line)
    return columns, cells


# ------------------------------------------------------------------------------------------------ running
def _variants(config: Config, vary: Mapping[str, Sequence[str]], plugins: Plugins) -> dict[str, Config]:
    """name -> configuration, each combination once, in the order of the values."""
    combinations = list(product(*vary.values()))
    if len(combinations) > MOST_VARIANTS:
        raise ConfigError(f"--vary: {len(combinations)} combinations; at most {MOST_VARIANTS} are compared at once")
    found: dict[str, Config] = {}
    for values in combinations:
        # names first, so that options varied along with a name are set on the named component
        overrides = dict(sorted(zip(vary, values, strict=True), key=lambda pair: not pair[0].endswith("name")))
        variant = with_overrides(config, overrides, plugins)
        if not any(key.split(".")[0] == "retrieval" for key in vary):
            variant = variant.model_copy(update={"retrieval": None})
        found[_label(vary, values) or config.name] = variant
    return found


def _label(vary: Mapping[str, Sequence[str]], values: Sequence[str]) -> str:
    """`din, unified` where the keys are names of components; else the key is said too."""
    parts = [v if k.endswith(".name") else f"{k}={v}" for k, v in zip(vary, values, strict=True)]
    return ", ".join(map(str, parts))


def _one(config: Config, folder: Path, plugins: Plugins) -> dict[str, Any]:
    """Trains one variant with one seed; its figures."""
    prepared = prepare(config, plugins)
    try:
        run = train_run(config, prepared, folder, plugins=plugins)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if run is None:
        raise ConfigError("compare runs in one process; start it without torchrun")
    return {**run.figures, "p50_ms": ranking_p50_ms(run)}


@torch.inference_mode()
def ranking_p50_ms(run: Run) -> float:
    """Median milliseconds of ranking 200 candidates for one user, on one thread: encoding, model, calibration.

    Users and candidates are drawn from the data by a fixed seed. Data without items is scored in batches of 200 rows.
    """
    task = run.prepared.schema.tasks[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = []
        for score in _requests(run):
            start = time.perf_counter()
            run.calibration[task].apply(score()[task])
            took.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(took[len(took) // 5 :])  # the first fifth warms up


def _requests(run: Run) -> list[Callable[[], dict[str, torch.Tensor]]]:
    prepared, model = run.prepared, run.model
    items = len(prepared.catalogue)
    rng = np.random.default_rng(1)
    if not items:
        batch = next(iter(prepared.batches("train", CANDIDATES)))
        return [lambda: model(batch)] * TIMED_REQUESTS
    users = _some_users(prepared)
    requests: list[Callable[[], dict[str, torch.Tensor]]] = []
    for n in range(TIMED_REQUESTS):
        rows = rng.choice(items, CANDIDATES, replace=items < CANDIDATES)
        user = users[n % len(users)]
        past = {prepared.schema.item or "item_id": user.history}
        request = ScoreRequest(user=user.features, history=past, items=prepared.catalogue.ids(rows))
        requests.append(partial(_encode_and_score, run, request))
    return requests


def _encode_and_score(run: Run, request: ScoreRequest) -> dict[str, torch.Tensor]:
    return run.model(run.prepared.encoder.encode_request(request, run.prepared.catalogue))


def _some_users(prepared: Prepared) -> list[UserState]:
    users = [user for _, user in zip(range(50), prepared.users(), strict=False)]
    return users or [UserState(user="")]


# ------------------------------------------------------------------------------------------------ the table
def side_by_side(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    everything = [run for some in runs.values() for run in some]
    rows: list[dict[str, Any]] = []
    popular = [b for run in everything if (b := run["baselines"].get("item_mean"))]
    if popular:
        rows.append(_row("popularity", popular, None))
    first = next(iter(runs.values()))
    for name, some in runs.items():
        rows.append(_row(name, some, None if some is first else first))
    return rows


def _row(name: str, runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "seeds": len(runs)}
    for figure in FIGURES:
        row[figure], row[f"{figure}_sd"] = _mean_sd([run.get(figure) for run in runs])
    for figure in PAIRED:
        differences = [_difference(a.get(figure), b.get(figure)) for a, b in zip(runs, base or (), strict=False)]
        mean, sd = _mean_sd(differences)
        row[f"{figure}_diff"] = mean
        row[f"{figure}_diff_se"] = None if sd is None else sd / len(differences) ** 0.5
    for figure in sorted({k for run in runs for k in run.get("retrieval") or ()}):
        row[figure], row[f"{figure}_sd"] = _mean_sd([(run.get("retrieval") or {}).get(figure) for run in runs])
    return row


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample deviation; None where a value is missing, and for the deviation of one."""
    known = [float(v) for v in values if isinstance(v, int | float)]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _with_spread(value: float | None, spread: float | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" if spread is None else f"{value:{form}} ± {spread:{form.lstrip('+')}}"


# ------------------------------------------------------------------------------------------------- writing
def _write(
    out: Path, config: Config, rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    text = json.dumps(
        {"config": config.name, "rows": rows, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False
    )
    (out / "compare.json").write_text(text + "\n", encoding="utf-8")
    names = [str(row["variant"]) for row in rows]
    charts = []
    for figure, title in (
        ("auc", "Test AUC"),
        ("gauc", "Test GAUC"),
        ("logloss", "Log loss"),
        ("p50_ms", "p50 of 200, ms"),
    ):
        spread = [row.get(f"{figure}_sd") for row in rows]
        charts.append((title, row_chart(names, [row.get(figure) for row in rows], title, errors=spread)))
    (out / "compare.svg").write_text(standalone(charts), encoding="utf-8")
    columns, cells = table(rows)
    seeds = rows[-1]["seeds"]
    note = (
        f"Means of {seeds} seeds ± sample deviation; differences are to the first variant over paired seeds ± standard "
        "error. Popularity is the item's smoothed mean in training."
    )
    section = Section("Variants", note, head=columns, rows=cells)
    for title, svg in charts:
        section.chart(title, svg)
    cards = [{"name": "runs", "value": show(sum(map(len, runs.values())))}, {"name": "seeds", "value": show(seeds)}]
    html = page(f"{config.name}: comparison", "", cards, [section])
    (out / "compare.html").write_text(html, encoding="utf-8")
