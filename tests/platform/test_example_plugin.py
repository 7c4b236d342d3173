"""A package of its own brings an interest and a source; a YAML file alone trains and serves with them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "plugin"


class Scratch:
    """An environment that has the package: this one's packages and a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "package"
        self.site = folder / "site"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--target", self.site, self.package], check=True, capture_output=True)
        self.environment = {**os.environ, "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}

    def run(self, *command: object, cwd: Path | None = None) -> str:
        run = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    return Scratch(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def run_folder(scratch: Scratch) -> Path:
    out = scratch.folder / "run"
    small = ["--set", "data.dataset.options={users: 60, items: 40, impressions: 3000}"]
    figures = json.loads(
        scratch.run("engine", "train", scratch.package / "acme.yaml", "--out", out, *small, "--json").splitlines()[-1]
    )
    assert 0 <= figures["auc"] <= 1
    return out


def test_its_own_tests_pass(scratch: Scratch) -> None:
    assert "3 passed" in scratch.run("pytest", "-q", "-p", "no:cacheprovider", cwd=scratch.package)


def test_its_plugins_are_listed_with_their_distribution(scratch: Scratch) -> None:
    rows = json.loads(scratch.run("engine", "plugins", "--json"))
    found = {(r["kind"], r["name"]): (r["distribution"], r["version"]) for r in rows}
    assert found["interests", "recency"] == ("acme-plexrank", "1.0.0")
    assert found["candidate_sources", "editorial"] == ("acme-plexrank", "1.0.0")
    assert found["interests", "din"][0] == "plexrank"


def test_its_mistakes_are_named_like_any_others(scratch: Scratch) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "engine", "validate", "acme.yaml", "--set", "interest.options.half_life=-1"],
        cwd=scratch.package, env=scratch.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "--set: interest.options.half_life: -1: should be greater than 0\n")


def test_the_bundle_names_the_package_that_trained_it(run_folder: Path) -> None:
    manifest = json.loads((run_folder / "bundle" / "manifest.json").read_text())
    assert "acme-plexrank" in json.dumps(manifest["plugins"])


@pytest.fixture(scope="module")
def address(scratch: Scratch, run_folder: Path) -> Iterator[str]:
    """A server of the bundle."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", run_folder / "bundle", "--port", port, "--state-dir", scratch.folder / "state"]
    log = (scratch.folder / "serve.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "engine", *map(str, command)], env=scratch.environment, stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (scratch.folder / "serve.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def ask(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def why(address: str, answer: dict[str, Any]) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{address}/v1/explain/{answer['request_id']}", timeout=30) as explained:
        return json.load(explained)["items"]


def test_the_editors_choice_is_served_and_ranked_by_the_packages_interest(address: str) -> None:
    answer = ask(address, "/v1/recommend", {"user": "a-newcomer", "count": 40, "timeout_ms": 5000})
    assert answer["degraded"] == []
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert {"i1", "i2", "i3"} <= {item["id"] for item in answer["items"]}
    reasons = {reason["item"]: reason["sources"] for reason in why(address, answer)}
    chosen = {item for item, sources in reasons.items() if "editorial" in sources}
    assert chosen == {"i1", "i2", "i3"} & set(reasons) != set()  # reasons are given for the best items


def test_its_weights_explain_the_answer(address: str) -> None:
    """half_life 5: the item at place j weighs 2^(-j/5), and the weights of a history sum to one."""
    history = [f"i{n}" for n in range(8)]
    answer = ask(address, "/v1/rank", {"history": history, "items": ["i20", "i21"], "timeout_ms": 5000})
    weights = [2 ** (-place / 5) for place in range(8)]
    expected = {item: weight / sum(weights) for item, weight in zip(history, weights, strict=True)}
    for reason in why(address, answer):
        shown = {part["item"]: part["weight"] for part in reason["history"]}
        assert shown
        assert shown == pytest.approx({item: expected[item] for item in shown}, abs=1e-4)
