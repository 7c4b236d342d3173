"""`learning.html` of a learner: what learning brought over the frozen bundle, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.streaming.learning.drift import judged
from engine.streaming.learning.guard import Verdict
from engine.training.charts import Series, bar_chart, line_chart
from engine.training.report import Section, page, show

_LAST, _POINTS = 20, 150
"""Verdicts that are listed, and points of a line, at most."""


def write_learning_report(
    path: Path,
    curve: Sequence[Mapping[str, Any]],
    drift: Mapping[str, float] | None,
    verdicts: Sequence[Verdict],
    counts: Mapping[str, Any],
    *,
    title: str = "learning",
) -> None:
    """Writes one self-contained page, and the same as JSON beside it (`learning.html`, `learning.json`).

    curve: `ProgressiveValidation.curve`. drift: `Drift.psi()`; None where the bundle has no reference to compare with.
    verdicts: the guard's, oldest first. counts: name -> number; `seconds`, where it is there, stage -> seconds spent.
    """
    seconds: Mapping[str, float] = counts.get("seconds") or {}
    numbers = {name: value for name, value in counts.items() if name != "seconds"}
    shown = list(reversed(curve[:: -max(1, -(-len(curve) // _POINTS))]))
    sections = [_progress(task, shown) for task in (curve[-1]["tasks"] if curve else ())]
    sections += [_drift(drift), _guard(verdicts), _counts(numbers)]
    if seconds:
        sections.append(_time(seconds, int(numbers.get("trained", 0))))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = page(f"{title}: learning report", created, _cards(curve, numbers), sections)
    path.write_text(text, encoding="utf-8")
    whole = {
        "created": created,
        "curve": list(curve),
        "drift": None if drift is None else dict(drift),
        "verdicts": [v.as_dict() for v in verdicts],
        "counts": dict(counts),
    }
    path.with_suffix(".json").write_text(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def _cards(curve: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> list[dict[str, str]]:
    last = next(iter(curve[-1]["tasks"].values())) if curve else {}
    names = {
        "total_auc": "progressive AUC, learner",
        "total_base_auc": "progressive AUC, frozen",
        "logloss": "log loss of late, learner",
        "base_logloss": "log loss of late, frozen",
    }
    cards = [{"name": label, "value": show(last.get(key))} for key, label in names.items()]
    return [*cards, {"name": "examples judged", "value": show(curve[-1]["examples"] if curve else 0)}]


def _progress(task: str, curve: Sequence[Mapping[str, Any]]) -> Section:
    x = [float(point["examples"]) for point in curve]

    def lines(**names: str) -> list[Series]:
        told = {label: [point["tasks"][task][key] for point in curve] for key, label in names.items()}
        return [Series(label, x, y) for label, y in told.items() if any(v is not None for v in y)]

    note = (
        "Every example is scored before it trains; the frozen bundle that learning began with scores the same rows. "
        "Rolling figures are of the newest examples of the window, progressive ones of all since the start."
    )
    section = Section(f"Task {task}", note)
    rolling, total = lines(auc="learner", base_auc="frozen"), lines(total_auc="learner", total_base_auc="frozen")
    section.chart("Progressive AUC", line_chart(total, "examples", "AUC since the start"))
    section.chart("Rolling AUC", line_chart(rolling, "examples", "AUC"))
    losses = lines(logloss="learner", base_logloss="frozen")
    section.chart("Log loss", line_chart(losses, "examples", "log loss"))
    often = lines(calibration="learner", base_calibration="frozen")
    section.chart("Predicted over observed positives", line_chart(often, "examples", "ratio"))
    return section


def _drift(drift: Mapping[str, float] | None) -> Section:
    if drift is None:
        return Section("Drift", "Not judged: the bundle has no drift.safetensors; train it again to have one.")
    if not drift:
        return Section("Drift", "Not judged yet: too few examples came.")
    rows = [(name, f"{value:.4f}", judged(value)) for name, value in drift.items()]
    note = (
        "Population stability index of each feature: the newest examples against the training rows. Below 0.1 nothing "
        "moved to speak of; above 0.25 the feature is another one than the model was trained on."
    )
    return Section("Drift", note, head=("feature", "PSI", ""), rows=rows)


def _guard(verdicts: Sequence[Verdict]) -> Section:
    stops = [
        v for before, v in zip([None, *verdicts], verdicts, strict=False) if not v.ok and (not before or before.ok)
    ]
    if not stops:
        return Section("Guard", f"Publishing never stopped in {len(verdicts):,} judgements.")
    note = f"Times that publishing stopped: {len(stops):,}, of {len(verdicts):,} judgements."
    rows = [(f"{v.examples:,}", "; ".join(v.reasons)) for v in stops[-_LAST:]]
    return Section("Guard", note, head=("after examples", "why"), rows=rows)


def _counts(counts: Mapping[str, Any]) -> Section:
    rows = [(name, show(value)) for name, value in counts.items() if not isinstance(value, Mapping | list | tuple)]
    return Section("Counts", head=("what", "how many"), rows=rows)


def _time(seconds: Mapping[str, float], trained: int) -> Section:
    whole = sum(seconds.values()) or 1.0
    longest = dict(sorted(seconds.items(), key=lambda pair: -pair[1]))
    rows = [
        (stage, f"{its:.2f}", f"{its / whole:.1%}", f"{1e6 * its / trained:.1f}" if trained else "–")
        for stage, its in longest.items()
    ]
    head = ("stage", "seconds", "share", "µs an example")
    section = Section("Where the time goes", f"{whole:.1f} seconds of the learner's thread.", head=head, rows=rows)
    section.chart("Share of the time", bar_chart(list(longest), [s / whole for s in longest.values()], "share"))
    return section
