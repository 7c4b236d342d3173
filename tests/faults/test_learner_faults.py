"""Whatever happens to a learner, each event is trained exactly once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.audit import RECORD
from engine.streaming.open_log import open_log
from tests.streaming.film_stream import visits

ROOT = Path(__file__).parents[2]
BATCH = 32


def configured(bundle: Path, folder: Path, **learning: Any) -> Path:
    """A file: the bundle's configuration, learning from a local log of two partitions."""
    whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json", exclude_defaults=True)
    whole["serving"]["event_log"] = {"name": "local", "options": {"partitions": 2, "fsync": "never"}}
    whole["learning"] = {
        "join": {"window_seconds": 20, "lateness_seconds": 5},
        "batch_size": BATCH,
        "chunk": 40,
        "checkpoint_events": 130,
        **learning,
    }
    Config.model_validate(whole)
    file = folder / "films.yaml"
    file.write_text(yaml.safe_dump(whole))
    return file


def arguments(config: Path, bundle: Path, state: Path, out: Path) -> list[str]:
    return [
        "learn", str(config), "--bundle", str(bundle), "--until", "end", "--state-dir", str(state), "--out", str(out),
        "--audit", str(out) + ".audit", "--json",
    ]  # fmt: skip


def alone() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(module: str, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *command], env=alone(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_learner_killed_at_twenty_random_points_ends_with_the_bits_of_an_unbroken_one(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """Real processes over a real log: weights, optimizers' state, encoder and vectors are equal bit by bit, each
    example was trained at the same step, and the counts add up to every event of the log."""
    config, state = configured(tiny_bundle, tmp_path), tmp_path / "state"
    stream = visits(900)
    stream.events[100:100] = [stream.events[3], ("u1", b"not json"), stream.events[5]]
    log = open_log(plugins, Config.model_validate(yaml.safe_load(config.read_text())).serving.event_log, state)
    stream.write(log)
    log.close()
    whole = json.loads(
        run("engine", *arguments(config, tiny_bundle, state, tmp_path / "whole")).stdout.splitlines()[-1]
    )

    broken = arguments(config, tiny_bundle, state, tmp_path / "broken")
    record = str(BATCH * RECORD.itemsize)
    lines = run("tests.faults.learner_lives", "20", "7", broken[-2], record, *broken).stdout.splitlines()
    assert lines[-1] == "kills 20"
    last = json.loads(lines[-2])

    for name in ("events", "join", "examples", "open", "steps", "positions", "figures"):
        assert last[name] == whole[name], name
    assert last["events"]["in"] == len(stream.events)
    assert last["events"]["in"] == sum(n for name, n in last["events"].items() if name != "in")
    assert last["events"]["duplicates"] == 2
    assert last["events"]["dead"] == 1
    assert last["examples"]["joined"] == last["examples"]["trained"] + last["examples"]["waiting"]
    fates = sum(last["join"][f"liked.{what}"] for what in ("positives", "negatives", "thinned"))
    assert last["join"]["impressions"] == len(stream.shown) == fates + last["open"]["liked"]

    trained = np.fromfile(broken[-2], RECORD)
    assert len(trained) == last["examples"]["trained"]
    assert len(np.unique(trained[["request", "item"]])) == len(trained), "each impression once"
    assert (tmp_path / "whole.audit").read_bytes() == (tmp_path / "broken.audit").read_bytes()
    one, two = (Bundle.open(tmp_path / name / "bundle").manifest.files for name in ("whole", "broken"))
    for file in ("model", "optimizer", "retrieval", "vectors"):
        assert one[f"{file}.safetensors"] == two[f"{file}.safetensors"], file
