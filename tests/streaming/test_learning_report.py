"""The learner's page: complete, escaped, without a network, and the same in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

from engine.streaming.learning.guard import Verdict
from engine.streaming.learning.progress import ProgressiveValidation
from engine.streaming.learning.report import write_learning_report
from tests.streaming.test_progress import fed, stream

VERDICTS = [
    Verdict(True, (), 2000),
    Verdict(False, ("log loss is <b>1.2</b> times",), 3000),
    Verdict(False, ("log loss is 1.3 times",), 3100),
    Verdict(True, (), 6000),
]
COUNTS = {"trained": 4000, "dead letters": 3, "seconds": {"join": 1.0, "train": 3.0}}


def curve():
    labels, live, base, seconds = stream(4000)
    return fed(ProgressiveValidation(["click"], 1000, every=500), labels, live, base, seconds, size=100).curve


def test_the_page_shows_both_models_the_drift_the_stops_and_the_time(tmp_path: Path) -> None:
    write_learning_report(tmp_path / "learning.html", curve(), {"user_id": 0.4, "item_id": 0.02}, VERDICTS, COUNTS)
    text = (tmp_path / "learning.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert text.count("learner: examples 4000") >= 4  # a last point in each chart
    assert text.count("frozen: examples 4000") >= 4
    assert re.search(r"user_id</td>\s*<td[^>]*>0\.4000</td>\s*<td[^>]*>drifted", text)
    assert "stopped: 1, of 4 judgements" in text
    assert "log loss is &lt;b&gt;1.2&lt;/b&gt; times" in text
    assert "75.0%" in text  # three of four seconds were training


def test_the_json_beside_it_holds_the_same(tmp_path: Path) -> None:
    points = curve()
    write_learning_report(tmp_path / "learning.html", points, {"user_id": 0.4}, VERDICTS, COUNTS)
    found = json.loads((tmp_path / "learning.json").read_text())
    assert found["curve"] == points
    assert found["drift"] == {"user_id": 0.4}
    assert found["verdicts"][1] == {"ok": False, "reasons": ["log loss is <b>1.2</b> times"], "examples": 3000}
    assert found["counts"] == COUNTS


def test_a_bundle_without_a_reference_says_so_and_an_empty_run_has_a_page(tmp_path: Path) -> None:
    write_learning_report(tmp_path / "learning.html", [], None, [], {})
    text = (tmp_path / "learning.html").read_text()
    assert "the bundle has no drift.safetensors" in text
    assert "Publishing never stopped in 0 judgements" in text
