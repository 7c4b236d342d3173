"""What is wrong with the data, before hours of training show it: `plexrank validate CONFIG --data`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.metrics import roc_auc_score

from engine.config import Config
from engine.data.encoding import MISSING
from engine.data.ingest import SPLITS
from engine.data.prepare import prepare
from engine.data.prepared import Prepared
from engine.data.store import chunks
from engine.errors import DataError, PluginError, SchemaError
from engine.plugins import Plugins

Status = Literal["PASS", "WARN", "FAIL"]

SAMPLE = 200_000
"""Rows of a split that are looked at, evenly spaced; all of them where there are fewer."""
LEAK_AUC = 0.98
"""A single feature that ranks this well most likely holds the label."""
UNSEEN = 0.5
"""Share of test rows with an id unknown to training from which a feature is warned about."""


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    status: Status
    detail: str


def check_data(config: Config, plugins: Plugins, *, cache: Path | None = None) -> list[Check]:
    """Prepares the data and looks at it. What cannot be prepared at all is one FAIL; no rows at all is a DataError."""
    try:
        prepared = prepare(config, plugins, cache=cache)
    except DataError as error:
        if "no rows" in str(error):
            raise
        return [Check("data", "FAIL", str(error))]
    except (SchemaError, PluginError) as error:
        return [Check("columns", "FAIL", str(error))]
    rows = ", ".join(f"{n} {count}" for n, count in prepared.rows.items())
    checks = [Check("columns", "PASS", "every feature has a column that fits its kind"), Check("rows", "PASS", rows)]
    checks += _parts(prepared)
    checks += _labels(prepared)
    if config.data.time:
        checks += _times(prepared)
    if config.data.user and config.data.item:
        checks.append(_duplicates(prepared))
    sample = _sample(prepared, "train")
    checks += _values(sample)
    checks += _leaks(sample)
    if prepared.rows["test"]:
        checks += _unseen(prepared)
    return checks


def _parts(prepared: Prepared) -> Iterator[Check]:
    for split in ("validation", "test"):
        if not prepared.rows[split]:
            yield Check(f"rows of {split}", "WARN", f"the split leaves no {split} rows")


def _labels(prepared: Prepared) -> Iterator[Check]:
    labels = prepared.arrays["labels"]
    for j, task in enumerate(prepared.schema.tasks):
        for split in SPLITS:
            rows = prepared.arrays[f"split.{split}"]
            if not len(rows):
                continue
            rate = sum(float(labels[rows[part], j].sum(dtype=np.float64)) for part in chunks(len(rows))) / len(rows)
            status: Status = "FAIL" if rate in (0.0, 1.0) else "WARN" if not 0.001 < rate < 0.999 else "PASS"
            yield Check(f"label rate of {task} in {split}", status, f"{rate:.4f}")


def _times(prepared: Prepared) -> Iterator[Check]:
    time = prepared.arrays["time"]
    low, high, sorted_so_far, last = np.inf, -np.inf, True, -np.inf
    for part in chunks(len(time)):
        piece = time[part]
        low, high = min(low, int(piece.min())), max(high, int(piece.max()))
        sorted_so_far = sorted_so_far and bool(piece[0] >= last and (np.diff(piece) >= 0).all())
        last = int(piece[-1])
    # a month after 1970 is a counter, the year 2200 is milliseconds
    plausible = low >= 0 and 2_678_400 < high < 7_258_118_400
    hint = "" if plausible else "; times are seconds since 1970 (milliseconds? a counter?)"
    yield Check("time unit", "PASS" if plausible else "WARN", f"{low:.0f} to {high:.0f}{hint}")
    yield Check("time order", "PASS", "the files are in time order" if sorted_so_far else "sorted while preparing")
    train, test = prepared.arrays["split.train"], prepared.arrays["split.test"]
    if len(train) and len(test):  # both are oldest first
        ahead = float(np.mean(time[test[:SAMPLE]] < time[train[-1]]))
        detail = f"{ahead:.1%} of test rows are older than the newest training row"
        yield Check(
            "test after train", "WARN" if ahead > 0 and prepared.config.data.split.by != "time" else "PASS", detail
        )


def _duplicates(prepared: Prepared) -> Check:
    """Equal (user, item, time): they stand beside each other in the order of users."""
    arrays = prepared.arrays
    order, twice = arrays["by_user"], 0
    for part in chunks(len(order)):
        rows = order[part.start : part.stop + 1]
        same = [arrays[name][rows[1:]] == arrays[name][rows[:-1]] for name in ("user", "item", "time")]
        twice += int(np.logical_and.reduce(same).sum())
    share = twice / len(order)
    return Check(
        "duplicates", "WARN" if share > 0.001 else "PASS", f"{twice} rows ({share:.2%}) repeat user, item and time"
    )


@dataclass
class _Column:
    """A feature in the sample: one value a place, and the row each belongs to."""

    name: str
    values: np.ndarray
    row: np.ndarray
    dense: bool


@dataclass
class _Sample:
    columns: list[_Column]
    labels: dict[str, np.ndarray]
    rows: int


def _sample(prepared: Prepared, split: str) -> _Sample:
    everything = prepared.arrays[f"split.{split}"]
    count = min(SAMPLE, len(everything))
    batch = prepared.batch(everything[np.linspace(0, len(everything) - 1, count).astype(np.int64)])
    columns = []
    for name, jagged in batch.jagged().items():
        if prepared.schema[name].kind != "sequence":
            row = np.repeat(np.arange(count), jagged.lengths().numpy())
            columns.append(_Column(name, jagged.values().numpy(), row, dense=False))
    for matrix, from_request in ((batch.dense_user, True), (batch.dense_item, False)):
        names = [f.name for f in prepared.schema.dense if f.from_request is from_request]
        columns += [_Column(n, matrix[:, j].numpy(), np.arange(count), dense=True) for j, n in enumerate(names)]
    return _Sample(columns, {task: label.numpy() for task, label in batch.labels.items()}, count)


def _values(sample: _Sample) -> Iterator[Check]:
    for column in sample.columns:
        missing = 0.0 if column.dense else float(np.sum(column.values == MISSING)) / sample.rows
        missing += 1 - len(np.unique(column.row)) / sample.rows
        distinct = len(np.unique(column.values))
        if missing >= 1:
            yield Check(f"values of {column.name}", "WARN", "empty in every row")
        elif distinct <= 1:
            yield Check(f"values of {column.name}", "WARN", "the same in every row: it tells nothing")
        else:
            detail = f"{distinct} distinct" + (f", {missing:.1%} missing" if missing else "")
            yield Check(f"values of {column.name}", "WARN" if missing > 0.95 else "PASS", detail)


def _leaks(sample: _Sample) -> Iterator[Check]:
    """One feature alone against each label: numbers by their size, ids by the rate that half of the rows teaches."""
    teach = np.arange(sample.rows) % 2 == 0
    for task, label in sample.labels.items():
        truth = label > 0.5
        found = []
        for column in sample.columns:
            score = column.values if column.dense else _rates(column, label, teach)
            judged = np.ones(sample.rows, bool) if column.dense else ~teach
            if 0 < truth[judged].sum() < judged.sum():
                area = float(roc_auc_score(truth[judged], score[judged]))
                if max(area, 1 - area) > LEAK_AUC:
                    found.append(f"{column.name} (AUC {max(area, 1 - area):.3f})")
        detail = f"alone predicts the label: {', '.join(found)}; is it known before the outcome?"
        yield Check(
            f"leakage of {task}", "FAIL" if found else "PASS", detail if found else "no feature alone predicts it"
        )


def _rates(column: _Column, label: np.ndarray, teach: np.ndarray) -> np.ndarray:
    """float64 [rows]: mean over a row's ids of their smoothed label rate in the teaching rows."""
    distinct, code = np.unique(column.values, return_inverse=True)
    taught = teach[column.row]
    base = float(label[teach].mean()) if teach.any() else 0.0
    count = np.bincount(code[taught], minlength=len(distinct))
    total = np.bincount(code[taught], weights=label[column.row[taught]], minlength=len(distinct))
    rate = (total + base) / (count + 1)
    size = np.bincount(column.row, minlength=len(label))
    summed = np.bincount(column.row, weights=rate[code], minlength=len(label))
    return np.where(size > 0, summed / np.maximum(size, 1), base)


def _unseen(prepared: Prepared) -> Iterator[Check]:
    for column in _sample(prepared, "test").columns:
        if column.dense or not len(column.values):
            continue
        known = prepared.statistics[prepared.schema[column.name].space].fingerprints
        share = float(np.mean(~np.isin(column.values, known)))
        detail = f"{share:.1%} of the test values never occur in training"
        yield Check(f"unseen {column.name}", "WARN" if share > UNSEEN else "PASS", detail)
