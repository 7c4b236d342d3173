"""The report of a run: whole, offline, and safe with names that are not."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from engine.config import Config
from engine.metrics import sigmoid
from engine.training import report
from engine.training.charts import Series, bar_chart, line_chart, row_chart, standalone
from engine.training.report import Buckets, Scored, Section, page, show, task_figures, write_report

EVIL = "</pre><script>alert(1)</script>"


def scored(rows: int = 2_000) -> Scored:
    rng = np.random.default_rng(7)
    x = rng.normal(0, 2, rows).astype(np.float32)
    y = (rng.random(rows) < sigmoid(x / 2)).astype(np.float32)
    users, items = rng.integers(0, 60, rows), rng.integers(0, 200, rows)
    return Scored(y, x, sigmoid(x / 2).astype(np.float32), users, items)


def config(title: str = "title") -> Config:
    return Config.model_validate(
        {
            "name": "films",
            "data": {"source": {"interactions": "x.csv"}, "title": title, "labels": {"liked": {"column": "rating"}}},
            "features": [{"name": "item_id"}],
        }
    )


@pytest.fixture
def written(tmp_path):
    def write(task: str = "liked", **changes) -> str:
        rows = scored()
        figures = {"auc": 0.71, "ece": 0.004, "raw_ece": 0.08, "version": "abc123", "seconds": 12.5}
        figures["baselines"] = {"item mean": {"auc": 0.70, "gauc": 0.709, "logloss": 0.62, "ne": 0.9, "ece": 0.01}}
        arguments = {
            "config": config(EVIL),
            "figures": figures,
            "history": [{"epoch": 1, "loss": 0.7, "auc": 0.65}, {"epoch": 2, "loss": 0.6, "auc": None}],
            "scored": {task: rows},
            "buckets": [Buckets("item popularity", np.random.default_rng(1).integers(0, 2000, len(rows.labels)))],
            "versions": {"torch": EVIL},
        }
        write_report(tmp_path / "report.html", **(arguments | changes))
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


class Tags(HTMLParser):
    """Opens and closes in balance."""

    EMPTY = ("meta", "br", "path", "circle", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_report_is_one_file_with_balanced_tags_and_no_address_to_load_from(written):
    html = written()
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen.count("svg") == 5
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert "http" not in re.sub(r'http-equiv="[^"]+"', "", html)


def test_names_from_outside_are_escaped(written):
    html = written(task=EVIL)
    assert EVIL not in html
    assert "&lt;script&gt;" in html


def test_the_figures_and_the_baseline_are_in_the_report(written):
    html = written()
    for text in ("0.71", "0.709", "item mean", "abc123", "item popularity", "before, 0.004 after"):
        assert text in html


def test_a_run_without_a_test_part_still_has_a_report(written):
    html = written(scored={}, buckets=[], history=[])
    assert "nothing to show" in html


def test_buckets_hold_every_row_once_and_begin_with_what_training_never_saw():
    rows = Scored(*(np.array(a, np.float32) for a in ([0, 1, 0, 1, 1], [0, 1, 2, 3, 4], [0.1, 0.9, 0.2, 0.8, 0.7])))
    section = report._by_bucket(rows, Buckets("user activity", np.array([0, 0, 1, 9, 1000])))
    assert [(row[0], row[1]) for row in section.rows] == [("new", "2"), ("1-9", "2"), ("1,000+", "1")]
    assert section.rows[0][3] == "1"  # AUC of the two new rows: in order
    assert section.rows[2][3] == "–"  # one class: undefined, not zero


def test_figures_are_given_raw_and_calibrated():
    rows = scored(20_000)
    figures = task_figures(rows)
    assert figures["ece"] < 0.02 < 0.09 < figures["raw_ece"]
    assert figures["logloss"] < figures["raw_logloss"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234567, "1,234,567"), (0.71234, "0.7123"), (1234.5, "1,234"), ("a", "a"), (True, "True")],
)
def test_figures_are_short(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    "svg",
    [
        line_chart([Series("a<b", [1, 2, 3], [0.5, None, float("nan")])], "x & y", "z", whole_x=True),
        line_chart([Series("one point", [1], [0.5])], "x", "y"),
        line_chart([Series("flat", [1, 2], [0.0, 0.0])], "x", "y", diagonal=True),
        line_chart([], "x", "y"),
        bar_chart(["<a>", "b"], [0.7, None], "AUC", guide=0.5),
        bar_chart(["worse than chance"], [0.4], "AUC", guide=0.5),
        row_chart(["<a>", "b", "c"], [0.7, None, 0.6], "AUC", errors=[0.01, None, 0.0]),
        row_chart(["one"], [0.7], "AUC"),
        row_chart(["none"], [None], "AUC"),
        bar_chart(["same", "value"], [0.0, 0.0], "AUC"),
        bar_chart(["none"], [None], "AUC"),
        bar_chart(["big"], [1.5e9], "bytes"),
    ],
)
def test_charts_are_well_formed_and_keep_inside_their_frame(svg):
    root = ElementTree.fromstring(f"<div>{svg}</div>")
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= 360
        assert 0 <= float(circle.get("cy")) <= 240
    for bar in root.iter("rect"):
        assert float(bar.get("height")) >= 0


def test_charts_stand_alone_under_one_another():
    rows = row_chart(list("abcdefgh"), [0.1 * n for n in range(8)], "AUC")
    root = ElementTree.fromstring(standalone([("first & best", rows), ("second", rows)]))
    assert root.get("viewBox") == f"0 0 360 {2 * (30 + 8 * 44 + 44)}"


def test_a_pages_table_cells_are_escaped():
    html = page("t", "s", [], [Section(EVIL, head=(EVIL,), rows=[(EVIL,)])])
    assert EVIL not in html
