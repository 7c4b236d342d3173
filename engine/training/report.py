"""`report.html` of a run: one file, no network, readable on a phone, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from engine import metrics
from engine.config import Config
from engine.training.charts import Series, bar_chart, line_chart

BOUNDS = (1, 10, 100, 1000)
"""Training impressions at which a bucket ends; the first bucket is what training never saw."""

FIGURES = ("auc", "gauc", "logloss", "ne", "ece")


@dataclass(frozen=True)
class Scored:
    """Test rows of one task: labels, logits, calibrated probabilities [n]; users and items int64 [n] or None."""

    labels: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    users: np.ndarray | None = None
    items: np.ndarray | None = None


@dataclass(frozen=True)
class Buckets:
    """Test rows by how often training saw something of theirs; `counts` int64 [n]."""

    what: str
    counts: np.ndarray


@dataclass
class Section:
    """A heading with charts, a table or a text below it."""

    title: str
    note: str = ""
    charts: list[dict[str, str]] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""

    def chart(self, title: str, svg: str) -> None:
        self.charts.append({"title": title, "svg": svg})


def write_report(
    path: Path,
    *,
    config: Config,
    figures: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    scored: Mapping[str, Scored],
    buckets: Sequence[Buckets],
    versions: Mapping[str, str],
) -> None:
    """Writes the report of a training run.

    figures: what `--json` prints (`auc`, ..., `baselines`: name -> figures of the same rows). history: one mapping an
    epoch. scored: task -> test rows, the ranking task first; empty without a test part. buckets: of those rows.
    """
    task = next(iter(scored), None)
    sections = [_curves(history)]
    if task is not None:
        sections.append(_calibration(task, scored[task], figures))
        sections += [_by_bucket(scored[task], b) for b in buckets]
        sections.append(_tasks(scored, figures))
    sections.append(_plain_table("Figures", figures))
    sections.append(Section("Versions", head=("what", "version"), rows=[(k, str(v)) for k, v in versions.items()]))
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    sections.append(Section("Configuration", "What differs from the defaults.", text=text))
    subtitle = f"{figures.get('created', '')} · version {figures.get('version', '-')} · seed {config.seed}"
    path.write_text(page(f"{config.name}: training report", subtitle, _cards(figures), sections), encoding="utf-8")


def page(title: str, subtitle: str, cards: Sequence[Mapping[str, str]], sections: Sequence[Section]) -> str:
    """The page around sections; every text is escaped, charts are trusted to have escaped theirs."""
    source = files("engine").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(title=title, subtitle=subtitle, cards=cards, sections=sections)


def show(value: Any) -> str:
    """A figure as people read it; a dash for what is undefined."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cards(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    names = {
        "auc": "test AUC",
        "gauc": "test GAUC",
        "logloss": "log loss",
        "ece": "ECE, calibrated",
        "rows_per_second": "training rows/s",
        "parameters": "parameters",
        "embedding_bytes": "embedding bytes",
        "seconds": "seconds",
    }
    return [{"name": label, "value": show(figures.get(key))} for key, label in names.items()]


def _curves(history: Sequence[Mapping[str, Any]]) -> Section:
    epochs = [float(entry.get("epoch", n + 1)) for n, entry in enumerate(history)]
    names = [k for k in ("loss", "train_loss", "logloss") if any(k in e for e in history)]
    labels = {"loss": "training loss", "train_loss": "training loss", "logloss": "validation log loss"}
    losses = [Series(labels[k], epochs, [e.get(k) for e in history]) for k in names]
    ranks = [Series(f"validation {k.upper()}", epochs, [e.get(k) for e in history]) for k in ("auc", "gauc")]
    section = Section("Learning", f"Epochs: {len(history)}; the best on the validation part is kept.")
    section.chart("Loss", line_chart(losses, "epoch", "loss", whole_x=True))
    section.chart("Ranking", line_chart(ranks, "epoch", "AUC", whole_x=True))
    return section


def _calibration(task: str, rows: Scored, figures: Mapping[str, Any]) -> Section:
    before = metrics.calibration_curve(rows.labels, metrics.sigmoid(rows.logits))
    after = metrics.calibration_curve(rows.labels, rows.probabilities)
    lines = [
        Series("before", before.predicted.tolist(), before.observed.tolist()),
        Series("after", after.predicted.tolist(), after.observed.tolist()),
    ]
    note = (
        f"ECE {show(figures.get('raw_ece'))} before, {show(figures.get('ece'))} after, on the test part; task {task}."
    )
    section = Section("Calibration", note)
    section.chart("Predicted and observed", line_chart(lines, "predicted", "observed", diagonal=True))
    edges = np.histogram_bin_edges(rows.probabilities, 10, (0, 1))
    share = np.histogram(rows.probabilities, edges)[0] / max(1, len(rows.probabilities))
    names = [f".{n}" for n in range(10)]
    section.chart("Share of rows by predicted probability", bar_chart(names, share.round(4).tolist(), "share"))
    return section


def _by_bucket(rows: Scored, buckets: Buckets) -> Section:
    which = np.digitize(buckets.counts, BOUNDS)
    names = ["new", *(f"{a:,}-{b - 1:,}" for a, b in pairwise(BOUNDS)), f"{BOUNDS[-1]:,}+"]
    table, bars, kept = [], [], []
    for number, name in enumerate(names):
        mine = which == number
        if not mine.any():
            continue
        y, p = rows.labels[mine], rows.probabilities[mine]
        area = metrics.auc(y, rows.logits[mine])
        own = None if rows.users is None else metrics.gauc(y, rows.logits[mine], rows.users[mine])
        share = f"{y.mean():.1%}"
        loss, error = metrics.logloss(y, p), metrics.ece(y, p)
        table.append((name, f"{int(mine.sum()):,}", share, show(area), show(own), show(loss), show(error)))
        bars.append(area)
        kept.append(name)
    section = Section(f"By {buckets.what}", head=(buckets.what, "rows", "positive", "AUC", "GAUC", "log loss", "ECE"))
    section.rows = table
    section.chart(f"AUC by {buckets.what}", bar_chart(kept, bars, "AUC", guide=0.5))
    return section


def _tasks(scored: Mapping[str, Scored], figures: Mapping[str, Any]) -> Section:
    """The model's tasks, and what a model has to beat, on the same rows."""
    rows = []
    for task, s in scored.items():
        own = task_figures(s)
        rows.append((f"model: {task}", *(show(own[k]) for k in FIGURES), show(None)))
    for name, base in (figures.get("baselines") or {}).items():
        gained = metrics.rel_impr(figures.get("auc"), base.get("auc"))
        rows.append((name, *(show(base.get(k)) for k in FIGURES), show(gained)))
    note = (
        "A model must beat the GAUC of the item mean to have learned anything personal. "
        "RelaImpr is the ranking task's (AUC - .5) / (baseline's AUC - .5) - 1."
    )
    head = ("", "AUC", "GAUC", "log loss", "NE", "ECE", "RelaImpr of the model")
    return Section("Against the baselines", note, head=head, rows=rows)


def task_figures(rows: Scored) -> dict[str, float | None]:
    """auc, gauc, logloss, ne, ece (of the calibrated probabilities) and raw_ece, raw_logloss of one task's rows."""
    raw = metrics.sigmoid(rows.logits)
    return {
        "auc": metrics.auc(rows.labels, rows.logits),
        "gauc": metrics.gauc(rows.labels, rows.logits, rows.users),
        "logloss": metrics.logloss(rows.labels, rows.probabilities),
        "ne": metrics.normalised_entropy(rows.labels, rows.probabilities),
        "ece": metrics.ece(rows.labels, rows.probabilities),
        "raw_logloss": metrics.logloss(rows.labels, raw),
        "raw_ece": metrics.ece(rows.labels, raw),
    }


def _plain_table(title: str, figures: Mapping[str, Any]) -> Section:
    rows = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            nested = {} if name in ("baselines", "tasks") else value
            rows += [(f"{name}: {k}", show(v)) for k, v in nested.items() if not isinstance(v, Mapping)]
        elif not isinstance(value, list | tuple):
            rows.append((name, show(value)))
    return Section(title, head=("figure", "value"), rows=rows)
