"""One process and two, table-wise and row-wise, begun at one and ended at the other: the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.plugins import installed
from engine.training.distributed import leaves_some_without
from engine.training.loop import TrainResult, train
from tests.training.small import SmallPrepared, small_config

TOLERANCE = 2e-4
"""Sums over two processes are rounded otherwise than over one, and two epochs of row-wise Adagrad amplify that."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(small_config(), SmallPrepared(), tmp_path_factory.mktemp("alone"), plugins=installed())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes under torchrun left; `begun-at-1` was begun here, at one process."""
    out = tmp_path_factory.mktemp("two")
    train(small_config(training={"epochs": 1}), SmallPrepared(), out / "begun-at-1", plugins=installed())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.small", "worlds", str(out)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "planner"])
def test_two_processes_reach_the_loss_of_one(two: Path, alone: TrainResult, sharding: str) -> None:
    theirs = json.loads((two / f"{sharding}.json").read_text())
    for epoch, mine in zip(theirs["history"], alone.metrics["history"], strict=True):
        assert epoch["loss"] == pytest.approx(mine["loss"], abs=1e-5)
        assert epoch["logloss"] == pytest.approx(mine["logloss"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "planner"])
def test_the_model_that_two_processes_leave_predicts_what_one_does(
    two: Path, alone: TrainResult, sharding: str
) -> None:
    """A KeyedTensor's columns follow the sharding plan: read by position and not by name, this differs by tenths."""
    assert alone.test is not None
    np.testing.assert_allclose(np.load(two / f"{sharding}.npy"), alone.test.logits["click"], atol=TOLERANCE)


@pytest.mark.slow
def test_a_run_begun_at_one_process_ends_at_two_in_another_sharding(two: Path, alone: TrainResult) -> None:
    assert alone.test is not None
    np.testing.assert_allclose(np.load(two / "begun-at-1.npy"), alone.test.logits["click"], atol=TOLERANCE)


@pytest.mark.slow
def test_a_run_begun_at_two_processes_ends_at_one(two: Path, alone: TrainResult) -> None:
    result = train(small_config(), SmallPrepared(), two / "begun-at-2", plugins=installed(), resume=True)
    assert result.test is not None
    assert alone.test is not None
    np.testing.assert_allclose(result.test.logits["click"], alone.test.logits["click"], atol=TOLERANCE)


@pytest.mark.slow
def test_unequal_shares_and_regularisation_do_not_depend_on_the_number_of_processes(two: Path, tmp_path: Path) -> None:
    """65 rows: the second batch has one row, so one of two processes has none; its ids count over both."""
    config = small_config(training={"epochs": 1, "mini_batch_aware_l2": 0.1, "optimizer": {"clip_norm": 0.5}})
    rows = {"train": 65, "validation": 3, "test": 20}
    result = train(config, SmallPrepared(rows=rows), tmp_path, plugins=installed())
    assert result.test is not None
    np.testing.assert_allclose(np.load(two / "l2.npy"), result.test.logits["click"], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "processes", "without"),
    [(1, 2, True), (2, 2, False), (3, 2, False), (5, 4, True), (8, 4, False), (9, 1, False)],
)
def test_a_table_too_short_for_row_wise_blocks_is_known(rows: int, processes: int, without: bool) -> None:
    """5 rows over 4 processes are blocks of 2, 2, 1 and 0."""
    assert leaves_some_without(rows, processes) is without
