"""A real Triton for tests: the server of `plexrank triton install`, and a small model that answers without plexrank.

The wheel is looked for in PLEXRANK_TRITON or plexrank's cache; where it is missing these tests skip and say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 8
input [ {{ name: "candidates" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true }} ]
output [ {{ name: "click" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "version" data_type: TYPE_UINT8 dims: [ -1 ] }} ]
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
version_policy {{ latest {{ num_versions: 2 }} }}
"""
MODEL = """\
import os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.version = np.frombuffer(("null-" + args["model_version"]).encode(), np.uint8)[None].copy()

    def execute(self, requests):
        answers = []
        for request in requests:
            ids = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "candidates"))
            while os.path.exists(os.path.join(os.path.dirname(__file__), "..", "..", "..", "hang")):
                time.sleep(0.1)
            scores = ((ids % 1000) / 1000).astype(np.float32)
            outputs = {"click": scores, "version": self.version}
            tensors = [pb_utils.Tensor.from_dlpack(name, array) for name, array in outputs.items()]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
"""
"""Scores each id with its last three digits. Hangs while a file `hang` is beside the repository."""

SUPERVISE = """\
import json, sys
from pathlib import Path
from serving.triton.supervisor import PlexrankError, Settings, Supervisor
settings = json.loads(sys.argv[3])
settings |= {name: Path(settings[name]) for name in ("wheel", "models") if name in settings}
wanted = Settings(Path(sys.argv[1]), Path(sys.argv[2]), **settings)
try:
    Supervisor(wanted, lambda state: print("ready", flush=True)).run()
except PlexrankError as error:
    sys.exit(str(error))
"""
ROOT = Path(__file__).parents[1]
IDS = np.array([7, 1250, 999], np.int64)


def null_model(
    repository: Path,
    name: str = "null",
    version: int = 1,
    *,
    instances: int = 1,
    code: str = MODEL,
    wrong: bool = False,
) -> Path:
    """Adds a version of a model -> its folder. wrong: its self-test expects other scores."""
    from serving.triton.selftest import SelfTest

    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name, instances=instances))
    (folder / "model.py").write_text(code)
    (folder / "__pycache__").touch()  # a file: what Python would write there makes Triton load the model again
    scores = np.array([0.007, 0.25, 0.1 if wrong else 0.999], np.float32)
    SelfTest({"candidates": IDS}, {"click": scores}, f"null-{version}").write(folder)
    return folder


@pytest.fixture(scope="session")
def triton_wheel() -> Any:
    """The installed wheel."""
    pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")
    from engine.errors import PlexrankError
    from serving.triton.wheel import find_wheel

    try:
        return find_wheel()
    except PlexrankError as error:
        pytest.skip(f"no Triton: {error}")


class Launched:
    """`plexrank triton up` in its own process, on free ports; ended at the end, whatever happened to it."""

    def __init__(self, repository: Path, folder: Path, *more: str, environment: dict[str, str] | None = None) -> None:
        self.repository, self.folder = repository, folder
        self.environment = {**os.environ, **(environment or {})}
        self._more = more
        self.process: subprocess.Popen[str] | None = None

    def command(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        """One of the other commands, on its state."""
        line = [sys.executable, "-m", "engine", "triton", name, "--dir", str(self.folder), *more]
        return subprocess.run(
            line, env=self.environment, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
        )

    def up(self, *more: str) -> subprocess.Popen[str]:
        """In the foreground; stdout is a pipe, stderr a file."""
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        line = ["-m", "engine", "triton", "up", str(self.repository), "--dir", str(self.folder), "--foreground"]
        return self._start([*line, *ports, *self._more, *more])

    def supervise(self, **settings: Any) -> subprocess.Popen[str]:
        """The same with settings that the command has no options for."""
        settings = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, **settings}
        return self._start(["-c", SUPERVISE, str(self.repository), str(self.folder), json.dumps(settings)])

    def _start(self, arguments: list[str]) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.folder.parent / "up.log").open("w"),
            text=True,
            cwd=ROOT,
        )
        return self.process

    def ready(self, *more: str) -> dict[str, Any]:
        """Starts it -> what `up --json` says when models answer."""
        process = self.up("--json", *more)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it ended with {process.wait()}: {self.words}"
        return dict(json.loads(line))

    def ends(self) -> tuple[int, str]:
        """Waits for its end -> exit status, what it said on stderr."""
        assert self.process is not None
        return self.process.wait(120), self.words

    @property
    def words(self) -> str:
        return (self.folder.parent / "up.log").read_text()

    @property
    def state(self) -> Any:
        from serving.triton.state import State

        state = State.read(self.folder)
        assert state is not None
        return state

    def stubs(self) -> list[Any]:
        """Processes of its models, hung ones included."""
        from serving.triton.stubs import Stubs

        return [] if self.state.server is None else Stubs(self.state.server.pid).alive()

    def client(self) -> Any:
        from serving.triton.client import TritonClient

        return TritonClient(self.state.url, self.state.control)

    def wait(self, what: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Until it is true -> its value."""
        until = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < until, f"it never came true: {self.words}"
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """Kills what still runs, which is quicker than a good end; that has tests of its own."""
        from serving.triton.report import stop
        from serving.triton.state import State

        state = State.read(self.folder)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for process in filter(None, [state.supervisor, state.server, state.follower] if state else []):
            process.send(signal.SIGKILL)
        stop(self.folder)


@pytest.fixture
def launched(triton_wheel: Any, tmp_path: Path) -> Iterator[Launched]:
    """Not started yet; its repository has no model yet."""
    (tmp_path / "repository").mkdir()
    server = Launched(tmp_path / "repository", tmp_path / "state")
    yield server
    server.close()
