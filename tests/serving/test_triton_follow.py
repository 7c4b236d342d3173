"""A process beside Triton brings what is promoted and what is learnt, while requests are answered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle, read_manifest
from engine.bundle.tensors import load_tensors
from engine.plugins import Plugins
from engine.streaming.deltas.delta import Delta, parsed
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.open_log import open_log
from engine.streaming.events.streams import STREAMS
from serving.triton.client import TritonClient
from serving.triton.export import Wish, export
from serving.triton.follow import Following
from serving.triton.follow_status import followed
from tests.inference.live_world import dense_of, rows_of
from tests.inference.rich_world import config_of, prepared_shop, random_request
from tests.scorers.conftest import delta
from tests.serving.triton_world import Load, another, answered, asked, bundle_of, differs, scorer_of
from tests.triton_server import ROOT, Launched

DELTAS = 120


class World:
    """A Triton with bundle A, a registry with A and B, a learner's end of the streams, and processes that follow."""

    def __init__(self, folder: Path, plugins: Plugins) -> None:
        self.folder = folder
        (folder / "shop").mkdir()
        prepared = prepared_shop(folder / "shop", plugins)
        self.a = bundle_of(config_of(folder / "shop"), prepared, plugins, folder / "a")
        self.b = another(self.a, folder / "b", 11)
        self.bundle = Bundle.open(self.a)
        self.registry = ModelRegistry(folder / "models")
        self.server = Launched(folder / "repository", folder / "state-of-triton")
        log = open_log(plugins, self.bundle.config.serving.event_log, folder / "state")
        self.streams = [log, *(log.sibling(name, **STREAMS[name]) for name in ("deltas", "models"))]
        self.publisher = DeltaPublisher(*self.streams[1:], self.registry)
        self.processes: list[subprocess.Popen[str]] = []
        rng = np.random.default_rng(4)
        self.requests = [random_request(rng, (1, 7, 40)) for _ in range(30)]

    def follow(self) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "engine", "triton", "follow", str(self.server.repository)]
        line += ["--models", str(self.registry.root), "--url", self.server.state.url]
        line += ["--state-dir", str(self.folder / "state")]
        said = (self.folder / f"follow-{len(self.processes)}.log").open("w")
        self.processes.append(subprocess.Popen(line, stdout=said, stderr=said, text=True, cwd=ROOT))
        return self.processes[-1]

    def words(self, number: int) -> str:
        return (self.folder / f"follow-{number}.log").read_text()

    def status(self) -> dict[str, Any]:
        (its,) = followed(self.server.repository)
        return its

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.server.close()
        self.publisher.close()
        for stream in self.streams:
            stream.close()


@pytest.fixture(scope="module")
def world(triton_wheel: Any, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("follow"), plugins)
    try:
        export(Wish(world.a), world.server.repository)
        world.publisher.publish_bundle(world.a, 1, "first")
        world.server.ready()
        yield world
    finally:
        world.close()


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[TritonClient]:
    with world.server.client() as client:
        yield client


@pytest.fixture(scope="module")
def chain(world: World) -> list[Delta]:
    """Rows in each, a dense part in every tenth."""
    weights = load_tensors(world.a / "model.safetensors")
    return [
        replace(
            delta(world.a, n, epoch=1, created=time.time(), newest=time.time()),
            tables=rows_of(weights, n),
            dense=dense_of(weights, 1 + n / 500) if n % 10 == 0 else {},
        )
        for n in range(1, DELTAS + 3)
    ]


def until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it did not come about: {what}"
        time.sleep(0.05)


def scores_are(client: TritonClient, world: World, scorer: Any) -> None:
    """Those of a scorer that took the same deltas."""
    for tensors, expected in asked(world.a, world.requests, [scorer]):
        answer = client.infer("shop", tensors)
        assert answered(answer) == scorer.version
        assert differs(answer, expected[scorer.version]) <= 1e-5


def test_deltas_at_full_rate_reach_the_answers_and_none_fails(
    world: World, client: TritonClient, chain: list[Delta]
) -> None:
    world.follow()
    tensors = [inputs for inputs, _ in asked(world.a, world.requests, [])]

    def check(number: int, answer: Any) -> str:
        wanted = len(tensors[number]["candidates"])
        good = all(answer[t].shape == (wanted,) and (np.abs(answer[t] - 0.5) <= 0.5).all() for t in ("click", "buy"))
        return "" if good else f"request {number}: {answer}"

    with Load(client.url, "shop", tensors, check) as load:
        for one in chain[:DELTAS]:
            world.publisher.publish(one)
        load.wait_for(chain[DELTAS - 1].version.__eq__)
    assert load.wrong == []
    places = [parsed(version)[1:] for version in load.seen]
    assert places == sorted(places), "the versions of answers went back"
    scorer = scorer_of(world.a)
    for one in chain[:DELTAS]:
        scorer.apply(one)
    scores_are(client, world, scorer)
    until(lambda: world.status()["applied"] == DELTAS, "the status says so")
    status = world.status()
    assert (status["model"], status["number"], status["version"]) == ("shop", 1, chain[DELTAS - 1].version)
    assert status["rows"] == sum(one.row_count for one in chain[:DELTAS])
    assert (status["errors"], status["trouble"]) == (0, None)
    assert 0 <= status["silent_seconds"] < 30
    shown = json.loads(world.server.command("status", "--json").stdout)["followed"]
    assert [(its["model"], its["pid"], its["applied"]) for its in shown] == [("shop", world.processes[0].pid, DELTAS)]


def test_a_second_process_is_refused_by_name(world: World) -> None:
    second = world.follow()
    assert second.wait(60) == 1
    assert f"process {world.processes[0].pid} writes there already" in world.words(1)


def test_a_killed_process_goes_on_where_it_was(world: World, client: TritonClient, chain: list[Delta]) -> None:
    world.processes[0].send_signal(signal.SIGKILL)
    world.processes[0].wait()
    assert answered(client.infer("shop", _few(world))) == chain[DELTAS - 1].version
    world.publisher.publish(chain[DELTAS])
    world.follow()
    until(lambda: answered(client.infer("shop", _few(world))) == chain[DELTAS].version, "the next delta")
    until(lambda: world.status()["pid"] == world.processes[2].pid, "the status is the new process'")


def test_it_waits_for_a_promotion_and_a_triton(tmp_path: Path, world: World) -> None:
    registry = ModelRegistry(tmp_path / "models")
    following = Following(
        tmp_path / "repository", registry, TritonClient("127.0.0.1:1"), tmp_path / "state", name="shop"
    )
    thread = threading.Thread(target=following.run)
    thread.start()

    def trouble() -> str:
        found = following.status()
        return "" if found is None else found.trouble or ""

    until(lambda: "nothing was promoted yet" in trouble(), "it waits for a promotion")
    registry.promote(registry.take_in(world.a))
    until(lambda: "no Triton answers" in trouble(), "it waits for a Triton")
    following.stop()
    thread.join(60)
    assert not thread.is_alive()
    (status,) = followed(tmp_path / "repository")
    assert (status["model"], status["version"], status["age_seconds"]) == ("shop", None, None)
    assert "no Triton answers" in status["trouble"]
    assert not (tmp_path / "repository").exists()


def _few(world: World) -> dict[str, np.ndarray]:
    return {"candidates": world.bundle.catalogue.prints[:3]}


def test_live_memory_that_was_removed_is_made_anew_and_filled(
    world: World, client: TritonClient, chain: list[Delta]
) -> None:
    """Instances score on with what they have mapped; the next delta brings the whole chain."""
    shutil.rmtree(world.folder / "repository-live" / "shop" / "1")
    assert answered(client.infer("shop", _few(world))) == chain[DELTAS].version
    world.publisher.publish(chain[DELTAS + 1])
    until(lambda: answered(client.infer("shop", _few(world))) == chain[DELTAS + 1].version, "the next delta")
    scorer = scorer_of(world.a)
    for one in chain:
        scorer.apply(one)
    scores_are(client, world, scorer)


def test_what_is_promoted_takes_over_and_a_rollback_too(world: World, client: TritonClient, chain: list[Delta]) -> None:
    tensors = [inputs for inputs, _ in asked(world.a, world.requests, [])]
    a, b = (read_manifest(path).version for path in (world.a, world.b))
    with Load(client.url, "shop", tensors) as load:
        world.publisher.publish_bundle(world.b, 1, "learned")
        load.wait_for(b.__eq__)
        world.publisher.publish(replace(chain[0], base=b))
        load.wait_for(f"{b}+1.1".__eq__)
        world.registry.rollback(reason="worse")
        load.wait_for(a.__eq__)
    assert load.wrong == []
    scores_are(client, world, scorer_of(world.a))
    until(lambda: world.status()["version"] == a, "the status says so")
    assert world.status()["number"] == 3
    os.kill(world.processes[2].pid, signal.SIGTERM)
    assert world.processes[2].wait(30) == 0
