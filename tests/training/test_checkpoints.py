"""Checkpoints: what is interrupted goes on as if it had not been; what is damaged is skipped and named."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from engine.plugins import installed
from engine.training import checkpoint
from engine.training.distributed import World
from engine.training.loop import train
from tests.training.small import SmallPrepared, small_config

ALONE = World(0, 1, torch.device("cpu"))


def test_a_run_killed_by_signal_9_continues_to_the_same_bits(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.small", "slow", str(broken)],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wanted = broken / "checkpoints" / checkpoint.step_name(6)
        deadline = time.monotonic() + 120
        while not wanted.exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
    config = small_config(training={"checkpoint": {"every_steps": 3, "keep": 2}})
    continued = train(config, SmallPrepared(), broken, plugins=installed(), resume=True)
    whole = train(config, SmallPrepared(), tmp_path / "whole", plugins=installed())
    assert continued.test is not None
    assert whole.test is not None
    assert np.array_equal(continued.test.logits["click"], whole.test.logits["click"])
    assert [e["loss"] for e in continued.metrics["history"]] == [e["loss"] for e in whole.metrics["history"]]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name]), name


def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(training={"checkpoint": {"every_steps": 3, "keep": 3}})
    whole = train(config, SmallPrepared(), tmp_path, plugins=installed())
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == [checkpoint.step_name(s) for s in (12, 15, 16)]
    for step in (15, 16):
        file = next((root / checkpoint.step_name(step)).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100] if step == 16 else file.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING, logger="plexrank.training"):
        continued = train(config, SmallPrepared(), tmp_path, plugins=installed(), resume=True)
    assert "step-000000016" in caplog.text
    assert "step-000000015" in caplog.text
    assert "damaged" in caplog.text
    assert continued.test is not None
    assert whole.test is not None
    assert np.array_equal(continued.test.logits["click"], whole.test.logits["click"])


def test_resuming_where_no_checkpoint_is_whole_is_refused(tmp_path: Path) -> None:
    train(small_config(training={"epochs": 1}), SmallPrepared(), tmp_path, plugins=installed())
    for index in tmp_path.glob("checkpoints/*/index.json"):
        index.write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint is whole; start anew without --resume"):
        train(small_config(), SmallPrepared(), tmp_path, plugins=installed(), resume=True)


def test_resuming_with_another_configuration_names_the_difference(tmp_path: Path) -> None:
    train(small_config(training={"epochs": 1}), SmallPrepared(), tmp_path, plugins=installed())
    other = small_config(training={"batch_size": 32})
    with pytest.raises(CheckpointError, match=r"training.batch_size = 64, the configuration now has 32"):
        train(other, SmallPrepared(), tmp_path, plugins=installed(), resume=True)


def test_resuming_where_there_is_nothing_starts_anew(tmp_path: Path) -> None:
    result = train(small_config(training={"epochs": 1}), SmallPrepared(), tmp_path, plugins=installed(), resume=True)
    assert result.metrics["epochs"] == 1


def test_a_finished_run_is_resumed_at_no_cost(tmp_path: Path) -> None:
    first = train(small_config(), SmallPrepared(), tmp_path, plugins=installed())
    again = train(small_config(), SmallPrepared(), tmp_path, plugins=installed(), resume=True)
    assert again.metrics["history"] == first.metrics["history"]
    assert first.test is not None
    assert again.test is not None
    assert np.array_equal(again.test.logits["click"], first.test.logits["click"])


def test_a_new_run_removes_the_checkpoints_of_an_old_one(tmp_path: Path) -> None:
    train(small_config(), SmallPrepared(), tmp_path, plugins=installed())
    train(small_config(training={"epochs": 1}), SmallPrepared(), tmp_path, plugins=installed())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [checkpoint.step_name(8)]


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    train(small_config(training={"epochs": 1}), SmallPrepared(), tmp_path, plugins=installed())
    files = sorted(p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    for file in files:
        assert b"\x80\x04" not in file.read_bytes()[:2]
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_rows_of_two_writers_are_read_into_three_parts_of_one(tmp_path: Path) -> None:
    """Ten rows written as 0..5 and 6..9 by hand; a reader of rows 4..7 takes two from each."""
    rows = torch.arange(20.0).reshape(10, 2)
    folder = tmp_path / "step-000000001"
    checkpoint.write(folder, {"w": rows[:6], "x": rows[6:]}, {"step": 1}, ALONE)
    index = json.loads((folder / "index.json").read_text())
    for part in index["members"][0]["parts"]:
        if part["tensor"] == "x":
            part.update(tensor="w", offset=6)
    found = checkpoint.Checkpoint(folder, index)
    target = torch.zeros(10, 2)
    found.read_into({"w": target})
    assert torch.equal(target, rows)
    with pytest.raises(CheckpointError, match="has 10 of the 12 rows wanted"):
        found.read_into({"w": torch.zeros(12, 2)})
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        found.read_into({"v": target})
