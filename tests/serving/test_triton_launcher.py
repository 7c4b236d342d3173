"""`plexrank triton up`, `status` and `down` on a real Triton: what is checked, what is said, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")

from engine.errors import PlexrankError
from serving.triton import shm
from serving.triton.client import TritonClient, TritonError
from serving.triton.launcher import Ports
from tests.triton_server import IDS, MODEL, Launched, null_model


def gone(pid: int) -> bool:
    """Ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_detached_server_answers_is_seen_by_another_shell_and_leaves_nothing(launched: Launched) -> None:
    null_model(launched.repository)
    null_model(launched.repository, version=2)
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    up = launched.command("up", str(launched.repository), *ports, "--json")
    assert up.returncode == 0, up.stderr
    told = json.loads(up.stdout)
    assert told["models"] == {"null": {"1": "null-1", "2": "null-2"}}
    with launched.client() as client:
        answers = [client.infer("null", {"candidates": IDS}, version) for version in ("1", "2", "")]
    assert [a["version"].tobytes() for a in answers] == [b"null-1", b"null-2", b"null-2"]
    np.testing.assert_allclose(answers[0]["click"], [0.007, 0.25, 0.999], rtol=1e-6)

    status = launched.command("status", "--json")
    seen = json.loads(status.stdout)
    assert (status.returncode, seen["ok"], seen["phase"], seen["pid"]) == (0, True, "ready", told["pid"])
    assert [(m["version"], m["answers"], m["tested"]) for m in seen["models"]] == [
        ("1", "null-1", True),
        ("2", "null-2", True),
    ]
    assert seen["ports"] == told["ports"]
    assert seen["shm_bytes"] >= 2 * shm.MIB
    assert oct((launched.folder / "triton.json").stat().st_mode & 0o777) == "0o600"

    again = launched.command("up", str(launched.repository), *ports)
    assert again.returncode == 1
    assert f"a server runs with this state already (process {told['pid']})" in again.stderr

    pids = [seen["server_pid"], *(instance["pid"] for instance in seen["instances"])]
    with launched.client() as client:
        client.unload("null")
    empty = launched.command("status")
    assert empty.returncode == 1
    assert "plexrank triton deploy BUNDLE" in empty.stdout
    assert launched.command("down").returncode == 0
    assert all(map(gone, [told["pid"], *pids]))
    assert shm.regions(seen["shm_prefix"]) == []
    assert launched.command("status").returncode == 1
    assert "no server runs" in launched.command("down").stdout


def test_what_lies_in_the_working_directory_is_no_module_of_the_models(triton_wheel: Any, tmp_path: Path) -> None:
    """`numbers` is one of Python's own, which numpy imports."""
    null_model(tmp_path / "repository")
    (tmp_path / "numbers.py").write_text("raise SystemExit('of the working directory')\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-P", "-m", "engine", "triton", *words, "--dir", "state", "--json"]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)

    try:
        up = run("up", "repository", *(f"--{name}-port=0" for name in ("http", "grpc", "metrics")))
        assert up.returncode == 0, up.stderr
        assert json.loads(up.stdout)["models"] == {"null": {"1": "null-1"}}
    finally:
        assert run("down").returncode == 0


def test_a_broken_model_is_named_and_a_wrong_one_unloaded_while_the_others_serve(launched: Launched) -> None:
    null_model(launched.repository, "good")
    null_model(launched.repository, "broken", code="raise RuntimeError('no such layer')\n")
    null_model(launched.repository, "wrong", wrong=True)
    null_model(launched.repository, "damaged")
    (launched.repository / "damaged" / "config.pbtxt").write_text('name: "damaged"\ninput [ {')
    null_model(launched.repository, "cut")
    (launched.repository / "cut" / "1" / "selftest.safetensors").write_bytes(b"\x10")
    told = launched.ready()
    assert told["models"] == {"good": {"1": "null-1"}}
    assert sorted(told["faults"]) == ["broken", "cut", "damaged", "wrong"]
    assert "no such layer" in told["faults"]["broken"]
    assert "config.pbtxt: 2:" in told["faults"]["damaged"]
    assert "differ by up to 0.899 from the in-process scorer's" in told["faults"]["wrong"]
    assert "selftest.safetensors: damaged" in told["faults"]["cut"]
    with launched.client() as client, pytest.raises(TritonError, match=r"not found|unknown model|no available"):
        client.infer("wrong", {"candidates": IDS})
    status = launched.command("status")
    assert status.returncode == 1
    assert "no such layer" in status.stdout


def test_a_repository_without_a_model_that_answers_is_an_error(launched: Launched) -> None:
    null_model(launched.repository, "wrong", wrong=True)
    launched.up()
    code, said = launched.ends()
    assert code == 1
    assert "no model answers: wrong: self-test: scores of task 'click' differ" in said
    assert launched.command("status").stderr.count("no model answers") == 1
    assert shm.regions(shm.prefix_of(launched.folder)) == []


@pytest.mark.parametrize(
    ("prepare", "more", "said"),
    [
        (lambda folder: folder.rmdir(), [], "no such model repository; run: plexrank export triton"),
        (lambda folder: None, [], "holds no model; run: plexrank export triton"),
        (lambda folder: null_model(folder), ["--wheel", "absent"], "run: plexrank triton install --dir absent"),
    ],
)
def test_what_is_missing_is_said_before_a_server_starts(
    tmp_path: Path, prepare: Any, more: list[str], said: str
) -> None:
    (tmp_path / "repository").mkdir()
    prepare(tmp_path / "repository")
    launched = Launched(tmp_path / "repository", tmp_path / "state")
    launched.up(*more)
    code, words = launched.ends()
    assert code == 1
    assert said in words
    assert "Traceback" not in words


def test_without_the_wheel_the_command_that_brings_it_is_named(tmp_path: Path) -> None:
    null_model(tmp_path / "repository")
    launched = Launched(
        tmp_path / "repository", tmp_path / "state", environment={"PLEXRANK_TRITON": str(tmp_path / "none")}
    )
    launched.up()
    assert "no Triton server is installed there; run: plexrank triton install\n" in launched.ends()[1]


def test_a_port_that_is_taken_is_named(launched: Launched) -> None:
    null_model(launched.repository)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launched.up("--grpc-port", str(port))
        code, said = launched.ends()
    assert code == 1
    assert f"port {port} of 127.0.0.1, for grpc, is taken: choose another with --grpc-port" in said


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_address_that_the_server_cannot_listen_on_is_refused(host: str) -> None:
    """It would say that the port is in use."""
    with pytest.raises(PlexrankError, match=r"--host .* listens on IPv4 addresses alone"):
        Ports.chosen(host, 0, 0, 0)


def test_a_full_shared_memory_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    null_model(tmp_path, instances=4)

    def nearly_full(path: Path) -> os.statvfs_result:
        mib = 256  # blocks of 4096 bytes
        return os.statvfs_result((4096, 4096, 64 * mib, 20 * mib, 20 * mib, 0, 0, 0, 0, 255))

    shm.require_room(4, statvfs=nearly_full)
    with pytest.raises(PlexrankError, match=r"20\.0 MiB free of 64\.0, and 5 model instances need 21: .*--shm-size=1g"):
        shm.require_room(5, statvfs=nearly_full)
    with pytest.raises(PlexrankError, match="No such file or directory"):
        shm.require_room(1, tmp_path / "absent")


def test_nobody_without_the_secret_changes_models(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is code: over HTTP any page in a browser could send one, over gRPC whoever reaches an open address."""
    null_model(launched.repository)
    launched.environment["PLEXRANK_TRITON_CONTROL"] = "a secret"
    told = launched.ready()
    for path in ("repository/models/null/load", "repository/index", "logging"):
        with pytest.raises(urllib.error.HTTPError, match="Forbidden"):
            urllib.request.urlopen(f"http://127.0.0.1:{told['ports']['http']}/v2/{path}", b"{}")
    monkeypatch.delenv("PLEXRANK_TRITON_CONTROL", raising=False)
    with TritonClient(told["url"]) as stranger:
        assert stranger.infer("null", {"candidates": IDS})["click"].shape == (3,)
        for forbidden in (lambda: stranger.load("null"), lambda: stranger.unload("null"), stranger.index):
            with pytest.raises(TritonError, match="set PLEXRANK_TRITON_CONTROL"):
                forbidden()
    with TritonClient(told["url"], "a secret") as known:
        known.load("null")


def test_a_signal_ends_it_in_good_order(launched: Launched) -> None:
    null_model(launched.repository, instances=2)
    launched.ready()
    pids = [launched.state.server.pid, *(stub.process.pid for stub in launched.stubs())]
    assert len(pids) == 3
    assert launched.process is not None
    launched.process.send_signal(signal.SIGINT)
    assert launched.ends()[0] == 0
    assert all(map(gone, pids))
    assert shm.regions(launched.state.prefix) == []
    assert launched.state.phase == "stopped"


def test_a_signal_while_a_model_loads_ends_it_too(launched: Launched) -> None:
    null_model(launched.repository, code="import time\ntime.sleep(20)\n" + MODEL)
    process = launched.up()
    launched.wait(lambda: (launched.folder / "triton.json").exists() and launched.stubs())
    process.terminate()
    assert launched.ends()[0] == 0
    assert launched.state.server is None
    assert shm.regions(launched.state.prefix) == []
