"""The whole way, each part a process of its own: gateway, Triton, what follows beside it, learner, over a local log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")

from engine.bundle import read_manifest
from engine.streaming.deltas.registry import ModelRegistry
from tests.brokers import free_port
from tests.serving.triton_world import another
from tests.streaming.film_learner import PUBLISHING, configured
from tests.triton_server import ROOT, Launched

ITEMS = [str(n) for n in range(30)]


class Stack:
    """All processes, in one folder."""

    def __init__(self, folder: Path, first: Path, second: Path, launched: Launched) -> None:
        self.folder, self.launched = folder, launched
        registry = ModelRegistry(folder / "models")
        registry.promote(registry.take_in(first))
        self.other = registry.take_in(second)
        url = launched.ready("--models", str(folder / "models"), "--state-dir", str(folder / "gateway"))["url"]
        learning = {"join": {"window_seconds": 600, "lateness_seconds": 1}, "max_delay_seconds": 0.05, **PUBLISHING}
        config = configured(first, **learning).model_dump(mode="json", exclude_defaults=True)
        config["serving"]["scorer"] = {"name": "triton", "options": {"url": url}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """The gateway, and when it has begun the log, the learner."""
        self.processes.append(self._start("serve", "--port", str(self.port)))
        self.wait("the gateway scores by Triton", self.ready)
        self.processes.append(self._start("learn", "--out", str(self.folder / "learner"), "--from", "earliest"))

    def _start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        config = [*(["--config"] if name == "serve" else []), str(self.folder / "config.yaml")]
        places = ["--models", str(self.folder / "models"), "--state-dir", str(self.folder / "gateway")]
        with (self.folder / f"{name}.log").open("wb") as said:
            line = [sys.executable, "-m", "engine", name, *config, *places, *more]
            return subprocess.Popen(
                line, stdout=said, stderr=said, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def words(self) -> str:
        logs = [self.folder / "serve.log", self.folder / "learn.log", self.launched.folder / "follow.log"]
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs if log.exists())

    def wait(self, what: str, holds: Callable[[], Any], seconds: float = 60.0) -> Any:
        until = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < until, f"it did not come about: {what}\n{self.words()}"
            assert all(process.poll() is None for process in self.processes), self.words()
            time.sleep(0.02)
        return found

    def ready(self) -> bool:
        """The gateway scores, and by Triton."""
        try:
            answer = self.http.get("/health/ready")
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["degraded"] == []

    def rank(self, user: str) -> dict[str, Any]:
        answer = self.http.post("/v1/rank", json={"user": user, "items": ITEMS, "timeout_ms": 2000})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def click(self, user: str, item: str, ranking: str) -> None:
        data = {"type": "click", "user": user, "item": item, "ranking": ranking}
        event = {"specversion": "1.0", "id": uuid.uuid4().hex, "source": "test", "type": "interaction", "data": data}
        assert self.http.post("/v1/events", json=event).status_code == 202

    def close(self) -> None:
        self.http.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def stack(launched: Launched, tiny_bundle: Path, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, tiny_bundle, another(tiny_bundle, tmp_path / "other", 11), launched)
    try:
        stack.start()
        yield stack
    finally:
        stack.close()


class Visitors:
    """Two of them rank without a pause, from enter to exit; what they were answered is kept."""

    def __init__(self, stack: Stack) -> None:
        self.answers: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self._stack, self._end = stack, threading.Event()
        self._threads = [threading.Thread(target=self._visit, args=(f"u{n}",)) for n in range(2)]

    def _visit(self, user: str) -> None:
        while not self._end.wait(0.01):
            try:
                self.answers.append(self._stack.rank(user))
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def bases(self) -> list[str]:
        """Bundles that answered, in order."""
        found = [answer["model"]["version"].partition("+")[0] for answer in list(self.answers)]
        return [base for n, base in enumerate(found) if n == 0 or base != found[n - 1]]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
def test_a_click_reaches_tritons_answers_and_promotions_cost_no_request(stack: Stack, tiny_bundle: Path) -> None:
    a, b = read_manifest(tiny_bundle).version, stack.other

    before = stack.rank("u3")
    stack.click("u3", before["items"][7]["id"], before["request_id"])
    after = stack.rank("u3")
    scores = [{item["id"]: item["score"] for item in answer["items"]} for answer in (before, after)]
    assert before["degraded"] == after["degraded"] == []
    assert scores[0] != scores[1], "the click is in the user's history at once"

    def learned() -> str:
        answer = stack.rank("u4")
        assert answer["degraded"] == []
        return str(answer["model"]["version"]) if answer["model"]["version"] != a else ""

    assert stack.wait("the delta of the click scores", learned).startswith(f"{a}+1.")

    with Visitors(stack) as visitors:
        assert stack.http.post(f"/v1/models/{b}:promote", json={}).status_code == 200
        stack.wait("the promoted bundle scores", lambda: visitors.bases()[-1:] == [b])
        assert stack.http.post("/v1/models:rollback", json={}).status_code == 200
        stack.wait("the bundle before scores", lambda: visitors.bases()[-1:] == [a])
        gone = len(visitors.answers)
        status = stack.launched.command("status", "--json")
        stack.wait("it goes on", lambda: len(visitors.answers) > gone + 20)
    assert visitors.failed == []
    assert [answer["degraded"] for answer in visitors.answers if answer["degraded"]] == []
    assert status.returncode == 0, status.stdout
    held = {model["version"]: model["answers"].partition("+")[0] for model in json.loads(status.stdout)["models"]}
    assert set(held.values()) == {a, b}, "two versions answer, for who asks one of them"
