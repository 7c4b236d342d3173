"""Whatever happens to a learner, each event is trained exactly once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.bundle import Bundle
from engine.config import Config
from engine.plugins import Plugins
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import standing
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.open_log import open_log
from engine.streaming.learning.audit import RECORD
from engine.streaming.learning.learner import Learner
from tests.streaming.film_stream import visits
from tests.streaming.memory_log import MemoryLog

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

    for name in ("events", "join", "examples", "examples_sha256", "open", "steps", "positions", "figures"):
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


LEARNING = {"join": {"window_seconds": 20, "lateness_seconds": 5}, "batch_size": BATCH, "chunk": 40}


def in_process(bundle: Path, log: MemoryLog, out: Path, plugins: Plugins, **learning: Any) -> Learner:
    whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json")
    config = Config.model_validate({**whole, "learning": {**LEARNING, **learning}})
    return Learner(config, log, out, plugins=plugins, bundle=bundle, audit=out / "audit")


def test_a_full_disk_keeps_the_old_checkpoint_and_the_learner_goes_on(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """A limit on the length of files stands for the disk. The checkpoint that was whole stays, the failure is counted,
    the next one is written once there is room, and a crash meanwhile costs nothing but work."""
    log = MemoryLog()
    visits(200).write(log)
    learner = in_process(tiny_bundle, log, tmp_path, plugins, checkpoint_events=100_000)
    assert learner.save() is not None
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    learner.run("end")
    newest = learner.checkpoints.newest()
    assert newest is not None
    with full_disk():
        assert learner.save() is None
        assert learner.save() is None
    assert learner.summary()["checkpoints_failed"] == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [*kept, newest.path.name]
    assert learner.checkpoints.newest() is not None
    assert learner.save() is not None
    learner.close()
    again = in_process(tiny_bundle, log, tmp_path, plugins)
    assert again.trainer.steps == learner.trainer.steps
    again.close()


@contextmanager
def full_disk() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_copies_and_events_out_of_order_give_the_same_examples(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """Every event twice, and each up to five seconds from its place, which is what `lateness_seconds` allows: the same
    impressions become positive and negative, each once."""
    stream, log, wild = visits(300), MemoryLog(), MemoryLog()
    stream.write(log)
    rng = np.random.default_rng(3)
    places = np.argsort(np.repeat(np.arange(len(stream.events)), 2) + rng.uniform(0, 8, 2 * len(stream.events)))
    wild.append([stream.events[place // 2] for place in places.tolist()])
    told = []
    for name, its in (("tame", log), ("wild", wild)):
        learner = in_process(tiny_bundle, its, tmp_path / name, plugins, checkpoint_events=100_000)
        summary = learner.run("end")
        learner.close()
        trained = np.fromfile(tmp_path / name / "audit", RECORD)
        waiting = learner.stream.ready.pop(10_000)
        pairs = [
            *zip(trained["request"].tolist(), trained["item"].tolist(), trained["kind"].tolist(), strict=True),
            *zip(waiting.request.tolist(), waiting.item.tolist(), waiting.kind.tolist(), strict=True),
        ]
        assert len(set(pairs)) == len(pairs)
        told.append((summary, set(pairs)))
    (tame, one), (messy, two) = told
    assert messy["events"]["duplicates"] == len(stream.events)
    assert messy["events"]["in"] == 2 * tame["events"]["in"]
    assert messy["join"]["liked.positives"] == tame["join"]["liked.positives"] == len(stream.liked)
    assert {p for p in one if p[2] == 0} == {p for p in two if p[2] == 0}
    assert one == two


def test_a_learner_that_is_asked_to_stop_writes_a_checkpoint_and_its_counts(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """SIGTERM to a live learner: exit 0, JSON on stdout, and the next one reads nothing twice."""
    config, state = configured(tiny_bundle, tmp_path), tmp_path / "state"
    stream = visits(100)
    log = open_log(plugins, Config.model_validate(yaml.safe_load(config.read_text())).serving.event_log, state)
    stream.write(log)
    log.close()
    command = arguments(config, tiny_bundle, state, tmp_path / "out")
    command[command.index("--until") + 1] = "live"
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *command],
        env=alone(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        audit = Path(command[-2])
        end = time.monotonic() + 120
        while not (audit.exists() and audit.stat().st_size > 3 * BATCH * RECORD.itemsize):
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < end
            time.sleep(0.02)
        process.terminate()
        told, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said[-2000:]
    first = json.loads(told.splitlines()[-1])
    assert first["examples"]["trained"] > 0
    second = json.loads(run("engine", *arguments(config, tiny_bundle, state, tmp_path / "out")).stdout.splitlines()[-1])
    assert second["events"]["in"] == len(stream.events)
    assert second["events"]["duplicates"] == 0
    trained = np.fromfile(audit, RECORD)
    assert len(np.unique(trained[["request", "item"]])) == len(trained) == second["examples"]["trained"]


@pytest.mark.slow
def test_followers_of_a_learner_that_is_killed_have_its_weights_in_the_end(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """Deltas were published that no checkpoint knew of, and again after each crash, numbered on: put on the first
    bundle in their order they give the last one's weights, bit by bit."""
    config = configured(
        tiny_bundle,
        tmp_path,
        publish={"interval_seconds": 0.005, "dense_seconds": 0, "bundle_seconds": 1000},
        guard={"logloss_ratio": None, "auc_drop": None, "calibration": None},
    )
    state, models = tmp_path / "state", tmp_path / "models"
    loaded = Config.model_validate(yaml.safe_load(config.read_text()))
    log = open_log(plugins, loaded.serving.event_log, state)
    visits(500).write(log)
    broken = [*arguments(config, tiny_bundle, state, tmp_path / "out"), "--models", str(models)]
    audit = str(tmp_path / "out") + ".audit"
    record = str(BATCH * RECORD.itemsize)
    lines = run("tests.faults.learner_lives", "10", "3", audit, record, *broken).stdout.splitlines()
    assert lines[-1] == "kills 10"

    registry = ModelRegistry(models, loaded.name)
    pointer = registry.current()
    assert pointer is not None
    last = Bundle.open(registry.bundle(pointer.version))
    beside, assembler = log.sibling("deltas", partitions=1), Assembler()
    found = [assembler.add(record.value) for record in beside.reader({0: 0}).poll(1_000_000)]
    beside.close()
    log.close()
    base = str(last.manifest.parent)
    version, epoch, weights, applied = base, 0, dict[str, torch.Tensor](), 0
    for delta in found:
        if delta is None:
            continue
        if delta.epoch > epoch:  # killed before its first checkpoint, it began anew: followers load the bundle again
            version, epoch = base, delta.epoch
            weights = {n: v.clone() for n, v in Bundle.open(registry.bundle(base)).frozen_tensors().items()}
        if standing(delta, version) == "known":
            continue
        assert standing(delta, version) == "next", (delta.version, delta.after, version)
        for name, part in delta.tables.items():
            if not name.startswith("retrieval:"):
                weights[f"embedding.weights.{name}"][torch.from_numpy(part.rows)] = torch.from_numpy(part.values)
        weights.update({n: t for n, t in delta.dense.items() if not n.startswith("retrieval.")})
        version, applied = delta.version, applied + 1
    assert applied > 10
    for name, value in last.frozen_tensors().items():
        assert torch.equal(value, weights[name]), name
