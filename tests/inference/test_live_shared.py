"""Live memory is one for all processes, and none of them ever scores with half of a version."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.tensors import load_tensors
from engine.files import write_whole
from engine.inference.live import LiveModel
from engine.inference.live_writer import LiveWriter
from engine.plugins import Plugins
from engine.streaming.deltas.delta import Delta, TableRows, parsed
from tests.conftest import FilmWorld
from tests.inference.live_world import ended, fork, platt, scores
from tests.scorers.conftest import REQUESTS, delta, loaded

State = dict[str, Tensor]
MiB = 1 << 20


# ------------------------------------------------------------------------------------------------ consistency
def consistent(bundle: Path, weights: State, n: int) -> Delta:
    """All of it says n. Every row holds n. The ranker's hidden units are v, and its head divides by 16 v: the logit is
    1 + n/1024 where all of the dense part is n's and another one where a part is not; the calibration adds n/512."""
    v = 2.0 ** (n % 5)
    dense = {
        "ranker.body.0.weight": torch.zeros(16, 33),
        "ranker.body.0.bias": torch.full((16,), v),
        "ranker.heads.weight": torch.full((1, 16), 1 / (16 * v)),
        "ranker.heads.bias": torch.tensor([n / 1024]),
    }
    rows = {
        name.removeprefix("embedding.weights."): TableRows(np.arange(len(t)), np.full(tuple(t.shape), n, np.float32))
        for name, t in weights.items()
        if name.startswith("embedding.weights.")
    }
    return delta(bundle, n, tables=rows, dense=dense | platt(1.0, n / 512))


def score_of(n: int) -> float:
    return 1 / (1 + np.exp(-(1 + n / 1024 + n / 512)))


def test_no_score_is_of_half_a_dense_part_and_no_version_goes_back(tiny_bundle: Path, tmp_path: Path) -> None:
    """Two processes score, each with a thread that refreshes, while hundreds of deltas are applied."""
    bundle, weights = Bundle.open(tiny_bundle), load_tensors(tiny_bundle / "model.safetensors")
    last = 200
    with LiveWriter(tmp_path / "live", bundle) as writer:
        writer.apply(consistent(tiny_bundle, weights, 1))

        def reader(name: str) -> None:
            live = LiveModel.open(tmp_path / "live", bundle)
            ending = threading.Event()

            def refresh() -> None:
                while not ending.wait(0.001):
                    live.refresh()

            threading.Thread(target=refresh, daemon=True).start()
            seen, count, until = 1, 0, time.monotonic() + 120
            versions = set()
            while seen < last and time.monotonic() < until:
                view = live.now
                n = parsed(view.version)[2]
                assert n >= seen, f"from {seen} back to {n}"
                found = scores(view, REQUESTS[count % len(REQUESTS)])
                np.testing.assert_allclose(found, score_of(n), atol=1e-6, rtol=0)
                least = float(view.model.embedding.weights["t_item_id"].min())
                assert least >= n, f"rows of {least} at version {n}"
                assert view.items is not None
                assert float(view.items.held.vectors[:, :8].min()) >= n
                seen, count = n, count + 1
                versions.add(n)
                time.sleep(0.0005)  # the writer needs the machine, too
            ending.set()
            assert live.trouble is None
            write_whole(tmp_path / name, json.dumps([seen, count, len(versions)]).encode())

        children = [fork(lambda name=name: reader(name)) for name in ("a", "b")]
        for n in range(2, last + 1):
            writer.apply(consistent(tiny_bundle, weights, n))
        assert [ended(child) for child in children] == [0, 0]
    for name in ("a", "b"):
        seen, count, versions = json.loads((tmp_path / name).read_bytes())
        assert seen == last
        assert count > last
        assert versions > last / 5


# ------------------------------------------------------------------------------------------------ memory
@pytest.fixture(scope="module")
def large_bundle(films: FilmWorld, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One table of 64 MiB: 4 Mi rows of 4, two of them an id."""
    from engine.train_command import run_training

    folder = tmp_path_factory.mktemp("large")
    embedding = {"name": "unified", "dim": 8, "options": {"rows": 4 * MiB}}
    training = {"epochs": 1, "batch_size": 512, "threads": 1}
    run_training(films.config(name="large", embedding=embedding, training=training), folder, plugins=plugins)
    return Bundle.open(folder / "bundle", verify=False)


def mapped_kb(path: Path) -> dict[str, int]:
    """Of this process's map of a file, the kilobytes of /proc/self/smaps: Rss, Pss, Private_Dirty, ..."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if not head[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and head[-1] == "kB":
            found[head[0][:-1]] = found.get(head[0][:-1], 0) + int(head[1])
    return found


def own_kb() -> int:
    """What this process shares with nobody."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    held = {line.split()[0]: int(line.split()[1]) for line in lines}
    return held["Private_Dirty:"] + held["Private_Clean:"]


def test_processes_hold_one_copy_of_a_large_table_together(
    large_bundle: Bundle, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Two readers and the writer, at the same time, after each read all of the 64 MiB."""
    LiveWriter(tmp_path / "live", large_bundle).close()

    def together(names: Iterable[str]) -> None:
        until = time.monotonic() + 30
        for name in names:
            while not (tmp_path / name).exists():
                assert time.monotonic() < until, f"{name} does not come"
                time.sleep(0.01)

    def instance(name: str, others: tuple[str, ...]) -> None:
        loaded(tiny_bundle).score(REQUESTS[0])  # what a first scoring takes is not the table's,
        gc.collect()  # nor is what a collection touches of the parent's
        gc.freeze()
        before = own_kb()
        if name == "writer":
            writer = LiveWriter(tmp_path / "live", large_bundle)
            table = writer._view.model.embedding.weights["unified"]
            some = np.arange(0, 4 * MiB, 4 * MiB // 2400)
            rows = {"unified": TableRows(some, np.ones((len(some), 4), np.float32))}
            writer.apply(delta(large_bundle.path, tables=rows))
        else:
            live = LiveModel.open(tmp_path / "live", large_bundle)
            table = live.model.embedding.weights["unified"]
            scores(live.now, REQUESTS[0])
        float(table.sum())
        (tmp_path / f"{name}.ready").touch()
        together(f"{other}.ready" for other in others)
        held = mapped_kb(tmp_path / "live" / "gen-1" / "tables") | {"own": own_kb() - before}
        write_whole(tmp_path / f"{name}.json", json.dumps(held).encode())
        together(f"{other}.json" for other in others)

    names = ("one", "two", "writer")
    children = [fork(lambda name=name: instance(name, names)) for name in names]
    assert [ended(child) for child in children] == [0, 0, 0]
    table = 64 * 1024
    for name in names:
        held = json.loads((tmp_path / f"{name}.json").read_bytes())
        assert held["Rss"] >= table
        assert held["Private_Dirty"] == held["Private_Clean"] == 0
        assert held["Pss"] <= table / 3 + 64
        assert held["own"] < table / 4
