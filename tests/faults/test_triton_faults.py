"""A real Triton whose processes die or hang: it comes back by itself, or says why not, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc", reason="no client of Triton: pip install 'plexrank[triton]'")

from serving.triton import probe, shm
from serving.triton.client import TritonError
from serving.triton.probe import Prober
from serving.triton.stubs import Stubs
from serving.triton.wheel import BINARY, Wheel
from tests.triton_server import IDS, Launched, null_model


def answered(launched: Launched, version: str = "") -> str:
    """By which version of the model `null`; nothing where it fails."""
    with launched.client() as client:
        try:
            return client.infer("null", {"candidates": IDS}, version, timeout=3.0)["version"].tobytes().decode()
        except TritonError:
            return ""


def kill(launched: Launched, version: str, number: int = signal.SIGKILL) -> int:
    """One process of that version -> its pid."""
    pid = next(stub.process.pid for stub in launched.stubs() if stub.version == version)
    os.kill(pid, number)
    return pid


def test_a_dead_model_process_is_brought_back_beside_the_other_version(launched: Launched) -> None:
    null_model(launched.repository)
    null_model(launched.repository, version=2)
    launched.ready()
    other = [stub.process for stub in launched.stubs() if stub.version == "1"]
    regions = set(shm.regions(launched.state.prefix))
    kill(launched, "2")
    launched.wait(lambda: launched.state.revived == 1)
    assert (answered(launched), answered(launched, "1")) == ("null-2", "null-1")
    assert [stub.process for stub in launched.stubs() if stub.version == "1"] == other
    assert "null version 2: " in launched.state.last_fault["what"]
    assert "not healthy" in launched.state.last_fault["what"]
    # What the dead one had in shared memory is given back too: one region of two is another, and there are two again.
    launched.wait(lambda: len(shm.regions(launched.state.prefix)) == 2)
    assert len(regions & set(shm.regions(launched.state.prefix))) == 1
    assert launched.command("status").returncode == 0


def test_a_dead_instance_is_found_though_another_one_answers(launched: Launched) -> None:
    null_model(launched.repository, instances=2)
    launched.ready()
    kill(launched, "1")
    launched.wait(lambda: launched.state.revived == 1)
    assert [answered(launched) for _ in range(8)] == ["null-1"] * 8


def test_a_stopped_model_process_is_replaced(launched: Launched) -> None:
    null_model(launched.repository)
    launched.ready()
    stopped = kill(launched, "1", signal.SIGSTOP)
    launched.wait(lambda: launched.state.revived == 1)
    assert answered(launched) == "null-1"
    assert stopped != next(stub.process.pid for stub in launched.stubs() if stub.process.pid != stopped)


def test_a_model_that_answers_no_more_is_killed_and_loaded_again(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and Triton finds it well, but its requests never end. The probe's patience is cut short here."""
    null_model(launched.repository)
    launched.ready()
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    (launched.folder.parent / "hang").touch()
    with launched.client() as client:
        hung = launched.stubs()[0].process
        prober = Prober(client, Stubs(launched.state.server.pid), launched.state)
        for _ in range(4):
            prober.look(0.2)
        assert hung.alive
        (launched.folder.parent / "hang").rename(launched.folder.parent / "hangs no more")
        os.kill(hung.pid, signal.SIGSTOP)  # so that only a new process can answer
        prober.look(0.2)
    assert not hung.alive
    assert answered(launched) == "null-1"


def test_a_dead_server_is_started_again_on_its_ports(launched: Launched) -> None:
    null_model(launched.repository)
    url = launched.ready()["url"]
    dead = launched.state.server
    dead.send(signal.SIGKILL)
    launched.wait(lambda: launched.state.restarts == 1)
    assert launched.state.url == url
    assert answered(launched) == "null-1"
    assert "tritonserver ended with signal SIGKILL" in launched.state.last_fault["what"]
    assert len(shm.regions(launched.state.prefix)) == 1


def test_a_server_that_is_silent_is_killed_and_started_again(launched: Launched) -> None:
    null_model(launched.repository)
    process = launched.supervise(silence=1.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", launched.words
    launched.state.server.send(signal.SIGSTOP)
    launched.wait(lambda: launched.state.restarts == 1)
    assert answered(launched) == "null-1"
    assert "silent" in launched.state.last_fault["what"]


def test_it_gives_up_a_server_that_ends_again_and_again_and_says_why(launched: Launched, triton_wheel: Any) -> None:
    """The wheel's folder, with a server that refuses to start once a file says so."""
    null_model(launched.repository)
    folder = launched.folder.parent / "wheel"
    shutil.copytree(triton_wheel.folder, folder, copy_function=os.symlink)
    server = Wheel(folder).server
    server.unlink()
    server.write_text(
        f'#!/bin/sh\n[ -e {folder}/broken ] && echo "no licence" && exit 3\nexec {triton_wheel.folder / BINARY} "$@"\n'
    )
    server.chmod(0o755)
    process = launched.supervise(wheel=str(folder), tries=3, backoff=0.05)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", launched.words
    (folder / "broken").touch()
    launched.state.server.send(signal.SIGKILL)
    code, said = launched.ends()
    assert code == 1
    last = said.splitlines()[-1]
    assert (
        "gave up: tritonserver ended 3 times in a row; the last time: tritonserver ended with exit status 3: no licence"
        in last
    )
    status = launched.command("status")
    assert (status.returncode, "gave up" in status.stderr) == (1, True)


def test_nothing_outlives_a_supervisor_that_is_killed(launched: Launched) -> None:
    null_model(launched.repository)
    launched.ready()
    state, stubs = launched.state, [stub.process for stub in launched.stubs()]
    assert launched.process is not None
    launched.process.kill()
    launched.wait(lambda: not state.server.alive and not any(stub.alive for stub in stubs))
    status = launched.command("status")
    assert status.returncode == 1
    assert f"process {state.supervisor.pid}, which kept it, was killed while it was ready" in status.stderr


def test_the_next_start_ends_and_clears_what_a_killed_supervisor_left(launched: Launched) -> None:
    """The server hangs, so that it cannot end in good order when its parent is gone."""
    null_model(launched.repository)
    launched.ready()
    state, stubs = launched.state, [stub.process for stub in launched.stubs()]
    (left,) = shm.regions(state.prefix)
    state.server.send(signal.SIGSTOP)
    assert launched.process is not None
    launched.process.kill()
    launched.process.wait()
    assert state.server.alive
    launched.ready()
    assert not state.server.alive
    assert not any(stub.alive for stub in stubs)
    assert left not in shm.regions(state.prefix)
    assert answered(launched) == "null-1"


def test_a_repository_that_is_lost_while_it_serves_stops_nothing(launched: Launched) -> None:
    null_model(launched.repository)
    launched.ready()
    launched.repository.rename(launched.folder.parent / "elsewhere")
    time.sleep(2.5)  # two probes
    assert answered(launched) == "null-1"
    assert launched.state.phase == "ready"
    Path(launched.folder.parent / "elsewhere").rename(launched.repository)
    launched.wait(lambda: launched.command("status").returncode == 0)


def test_the_follower_is_started_beside_the_server_and_ended_with_it(launched: Launched) -> None:
    """With a registry a repository that is not there yet is no fault: the follower brings the first model."""
    there = launched.folder.parent
    launched.repository.rmdir()
    launched.up("--models", str(there / "registry"), "--state-dir", str(there / "gateway"))
    launched.wait(lambda: (launched.folder / "triton.json").exists() and launched.state.follower)
    follower = launched.state.follower
    command = Path(f"/proc/{follower.pid}/cmdline")
    words = launched.wait(lambda: "engine" in (said := command.read_text().split("\0")) and said)
    assert "-P" in words, "what lies in the working directory must not stand for plexrank's own modules"
    assert words[words.index("triton") :] == [
        *("triton", "follow", str(launched.repository), "--models", str(there / "registry")),
        *("--url", launched.state.url, "--state-dir", str(there / "gateway"), ""),
    ]
    assert launched.process is not None
    launched.process.terminate()
    assert launched.ends()[0] == 0
    assert not follower.alive
    assert shm.regions(launched.state.prefix) == []
