"""The benchmarks start, explain themselves, print one JSON object a line, and judge as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import criteo, multiplexing, quality_movielens, training_speed
from benchmarks.bare import bandwidth
from benchmarks.large_tables import make
from benchmarks.lines import Report
from benchmarks.peers import environment
from benchmarks.peers.export import export
from benchmarks.runs import Pace, spread
from engine.data.prepare import prepare
from engine.loading import load_config

ROOT = Path(__file__).resolve().parents[1]


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", everything.COMMANDS)
def test_each_benchmark_explains_itself(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_all_benchmarks_are_run_by_one_command() -> None:
    commands = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()}
    helpers = {"ours", "naive_server", "__main__"}
    assert set(everything.COMMANDS + everything.OTHERS) == commands - helpers


def test_an_unknown_benchmark_is_a_usage_error(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        everything.main(["speed"])
    assert stopped.value.code == 2
    assert "no benchmark named speed" in capsys.readouterr().err


def test_a_missed_target_fails_the_benchmark_and_a_quick_run_judges_nothing(capsys) -> None:
    strict, quick = Report("b", quick=False), Report("b", quick=True)
    for report in (strict, quick):
        report.line("fast", ours=np.float32(2.0), peer=1, target=">= 3 x", ok=False, ratio=2 / 3)
    assert (strict.end(), quick.end()) == (1, 0)
    lines = printed(capsys)
    assert lines[0]["ok"] is False
    assert lines[1]["ok"] is None
    assert lines[0]["ratio"] == pytest.approx(0.666667)
    assert lines[0]["ours"] == 2.0
    assert lines[2]["missed"] == ["fast"]
    assert lines[2]["machine"]["cores"] >= 1


@pytest.mark.slow
def test_quality_on_movielens_prints_din_beside_the_mean_and_the_items_means(capsys) -> None:
    assert quality_movielens.main(["--quick", "--only", "ml-100k time"]) == 0
    line, machine = printed(capsys)
    assert set(line["ours"]) == {"auc", "logloss", "gauc", "raw_logloss"}
    # computed once with scikit-learn from the raw file, without this code
    assert line["peer"]["item_mean"] == pytest.approx({"auc": 0.7049, "logloss": 0.6192, "gauc": 0.709}, abs=5e-4)
    assert line["din_minus_mean"]["mean"] == pytest.approx(
        line["ours"]["auc"] - line["peer"]["mean_interest"]["auc"], abs=2e-6
    )
    assert machine["missed"] == []


@pytest.mark.slow
def test_multiplexing_holds_each_compression_to_its_bytes(capsys) -> None:
    assert multiplexing.main(["--quick"]) == 0
    full, unified = printed(capsys)[:2]
    assert unified["ratio"] == pytest.approx(0.5, abs=0.01)
    for control in ("fair_hash", "same_bytes_by_narrower_width"):
        assert unified["peer"][control]["embedding_bytes"] == pytest.approx(
            0.5 * full["ours"]["embedding_bytes"], rel=0.02
        )


def test_data_that_may_not_be_redistributed_is_skipped_with_the_reason(monkeypatch, capsys) -> None:
    monkeypatch.delenv("PLEXRANK_DATA", raising=False)
    assert criteo.main(["--quick"]) == 0
    assert quality_movielens.main(["--quick", "--only", "ml-1m"]) == 0
    skipped = [line for line in printed(capsys) if "skipped" in line]
    assert ["PLEXRANK_DATA" in line["skipped"] for line in skipped] == [True, True]


def test_absent_peers_are_skipped_with_the_command_that_brings_them(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "python")
    assert training_speed.main(["--quick"]) == 0
    assert "python -m benchmarks.peers.environment" in printed(capsys)[0]["skipped"]


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ({"auc": 0.714, "gauc": 0.709, "logloss": 0.615}, True),
        ({"auc": 0.7139, "gauc": 0.709, "logloss": 0.615}, False),
        ({"auc": 0.714, "gauc": 0.709, "logloss": 0.6151}, False),
        ({"auc": 0.714, "gauc": None, "logloss": 0.615}, False),
    ],
)
def test_quality_is_judged_by_every_bound(figures: dict, met: bool) -> None:
    assert quality_movielens.judge(quality_movielens.CASES[0], figures)[1] is met


def test_multiplexing_is_judged_against_the_fair_hash_and_the_full_tables() -> None:
    assert multiplexing.judge(0.1, 4, ours=0.77, hashed=0.70, full=0.785)[1] is True
    assert multiplexing.judge(0.1, 4, ours=0.77, hashed=0.715, full=0.785)[1] is False
    assert multiplexing.judge(0.1, 4, ours=0.77, hashed=0.70, full=0.795)[1] is False
    assert multiplexing.judge(0.5, 2, ours=0.77, hashed=0.70, full=0.785)[1] is None


def test_rows_are_exported_as_others_read_them(films, plugins, tmp_path: Path) -> None:
    config = films.config(
        features=[
            {"name": "user_id", "side": "user"},
            {"name": "item_id"},
            {"name": "history", "kind": "sequence", "of": "item_id", "max_length": 5},
        ]
    )
    prepared = prepare(config, plugins, cache=tmp_path / "cache")
    with np.load(export(prepared, tmp_path / "rows.npz")) as stored:
        arrays = dict(stored)
    batch = next(prepared.batches("train", 64))
    history = batch.ids["history"]
    lengths = history.lengths().numpy()
    assert arrays["train/history"].shape == (prepared.rows["train"], 5)
    np.testing.assert_array_equal(arrays["train/history.length"][:64], lengths)
    assert ((arrays["train/history"][:64] > 0).sum(1) == lengths).all()
    assert arrays["train/item_id"].max() < arrays["sizes/item_id"]
    row = int(np.argmax(lengths > 1))
    ids = prepared.statistics["item_id"].fingerprints[arrays["train/history"][row, : lengths[row]] - 1]
    np.testing.assert_array_equal(ids, history.values()[history.offsets()[row] : history.offsets()[row + 1]].numpy())


def test_the_engine_and_the_bare_loop_read_the_same_large_tables(tmp_path: Path) -> None:
    data = make(tmp_path, rows=600, sizes=[50 + j for j in range(26)])
    with np.load(data.arrays) as stored:
        assert (stored["ids"].max(0) < np.arange(50, 76)).all()
    config = load_config(data.config)
    assert sum(config.embedding.options["rows"].values()) == sum(range(50, 76))
    asked = {
        "path": str(data.arrays),
        "sizes": [50 + j for j in range(26)],
        "dim": 8,
        "hidden": [16],
        "batch_size": 256,
    }
    bare = [sys.executable, str(ROOT / "benchmarks" / "bare" / "tables.py")]
    assert environment.last_object(bare, {**asked, "seed": 1})["rows_per_second"] > 0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        environment.last_object([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_only_training_steps_are_clocked(monkeypatch) -> None:
    now = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr("benchmarks.runs.time.perf_counter", lambda: next(now))
    pace = Pace()
    for stage, done in (("training; epoch 1/2", 0.1), ("training; epoch 1/2", 0.5), ("retrieval", 0.5),
                        ("training; epoch 2/2", 0.6), ("training; epoch 2/2", 1.0)):  # fmt: skip
        pace(stage, done)
    share, wall, _ = pace.seconds()
    assert share == pytest.approx(0.8)  # .1 to .5 and .6 to 1
    assert wall == pytest.approx(3.0)  # 0 to 1 and 5 to 7: what lies between the epochs is not training


def test_the_bandwidth_is_that_of_the_memory() -> None:
    threads = torch.get_num_threads()
    try:
        copy = bandwidth.copy_bytes_per_second(1 << 24, repeats=2)
        gather = bandwidth.gather_bytes_per_second(50_000, 16, 1 << 15, repeats=2)
    finally:
        torch.set_num_threads(threads)
    assert 1e8 < gather < 1e12
    assert 1e8 < copy < 1e12


def test_one_seed_has_no_spread() -> None:
    assert spread([0.7]) == 0.0
    assert spread([0.7, 0.8]) == pytest.approx(0.0707107)


def test_the_peers_scripts_import_nothing_of_the_engine() -> None:
    for folder, kept in (("peers", {"export.py"}), ("bare", set())):
        for path in (ROOT / "benchmarks" / folder).glob("*.py"):
            if path.name not in kept:
                done = subprocess.run(["grep", "-nE", r"^(from|import) (engine|plugins|models|serving)", str(path)],
                                      capture_output=True, text=True)  # fmt: skip
                assert done.stdout == "", f"{path.name}: {done.stdout}"
