"""The doctor names a set of versions that do not fit, from real metadata, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.doctor import examine_machine, examine_services, examine_trio, trio
from engine.doctor.finding import Finding

ROOT = Path(__file__).parents[2]


def named(findings: list[Finding], name: str) -> Finding:
    return next(f for f in findings if f.name == name)


def test_a_machine_that_works_is_told_so() -> None:
    findings = examine_trio()
    assert [f for f in findings if f.status == "wrong"] == []
    assert named(findings, "fbgemm operators").status == "ok"


def test_the_matching_set_is_the_one_that_pyproject_asks_for() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"torch=={trio.TRIO['torch']}", f"torchrec=={trio.TRIO['torchrec']}"} <= set(wanted)
    assert f"fbgemm-gpu=={trio.TRIO['fbgemm']}" in wanted
    assert all(version in trio.MATCHING for version in trio.TRIO.values())


def fake_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(trio, "_operation", lambda versions_fit: [])


@pytest.mark.parametrize(
    ("versions", "what", "detail", "remedy"),
    [
        ({"torchrec": "1.2.0"}, "torchrec", "torchrec 1.2.0 does not fit", "install --no-deps torchrec==1.8.0"),
        ({"torch": "2.12.0+cpu"}, "torch", "torch 2.12.0 does not fit", "install torch==2.13.0"),
        ({"fbgemm-gpu-cpu": "1.7.0"}, "fbgemm", "fbgemm-gpu-cpu 1.7.0 does not", "--no-deps fbgemm-gpu-cpu==1.8.0"),
        ({"torchrec": None}, "torchrec", "not installed", "install --no-deps torchrec==1.8.0"),
        ({"fbgemm-gpu-cpu": None, "fbgemm-gpu": None}, "fbgemm", "not installed", "fbgemm-gpu-cpu==1.8.0"),
        ({"fbgemm-gpu": "1.7.0"}, "fbgemm build", "stand-in fbgemm-gpu is 1.7.0", "./packaging/fbgemm-gpu"),
    ],
)  # fmt: skip
def test_a_wrong_version_is_named_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], what: str, detail: str, remedy: str
) -> None:
    fake_versions(monkeypatch, versions)
    finding = named(examine_trio(), what)
    assert finding.status == "wrong"
    assert detail in finding.detail
    assert remedy in finding.remedy
    if what != "fbgemm build":
        assert trio.MATCHING in finding.detail


def test_two_builds_of_fbgemm_over_one_another_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})
    monkeypatch.setattr(trio, "_is_stand_in", lambda: False)
    finding = named(examine_trio(), "fbgemm build")
    assert (finding.status, "overwrites" in finding.detail) == ("wrong", True)
    assert "uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in finding.remedy


def doctor(**environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    """`plexrank doctor --json` in a process of its own: exit code, findings by name."""
    run = subprocess.run(
        [sys.executable, "-m", "engine", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        check=False,
    )
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["ok"] == (run.returncode == 0), run.stderr
    return run.returncode, {f["name"]: f for f in report["findings"]}


def test_metadata_of_another_torchrec_on_the_path_makes_the_command_fail(tmp_path: Path) -> None:
    info = tmp_path / "torchrec-1.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 1.3.0\n")
    code, findings = doctor(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert findings["torchrec"]["status"] == "wrong"
    assert findings["torchrec"]["detail"].startswith("torchrec 1.3.0 does not fit")
    assert findings["torch"]["status"] == "ok"


def test_operators_that_do_not_load_are_told_without_a_crash(tmp_path: Path) -> None:
    package = tmp_path / "fbgemm_gpu"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c10')")
    code, findings = doctor(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert "undefined symbol" in findings["fbgemm operators"]["detail"]
    assert "--force-reinstall" in findings["fbgemm operators"]["remedy"]


def test_memory_disk_and_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f.name for f in examine_machine()]
    assert names == ["cpu", "memory", "disk here", "disk for temporary files"]
    monkeypatch.setattr("engine.doctor.machine.LEAST_DISK", 1 << 60)
    assert named(examine_machine(), "disk here").status == "warn"
    assert named(examine_machine(), "disk here").remedy.startswith("df -h")


# ----------------------------------------------------------------------------------------------- services
def serve_once(answer: Callable[[bytes], bytes] | bytes) -> str:
    """A server on a free port that answers one connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        link, _ = listener.accept()
        with link, listener:
            asked = link.recv(1024)
            link.sendall(answer if isinstance(answer, bytes) else answer(asked))

    threading.Thread(target=run, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_services_that_are_not_configured_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAFKA_BOOTSTRAP", "TRITON_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    assert [(f.name, f.status) for f in examine_services()] == [
        ("kafka", "info"),
        ("triton", "info"),
        ("redis", "info"),
    ]


def test_services_that_do_not_answer_come_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP", f"127.0.0.1:{closed_port()}")
    monkeypatch.setenv("TRITON_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("REDIS_URL", f"redis://:secret@127.0.0.1:{closed_port()}")
    findings = examine_services()
    assert [f.status for f in findings] == ["warn"] * 3
    assert all("not reachable" in f.detail and f.remedy for f in findings)
    assert not any("secret" in f.detail for f in findings)


def test_services_that_answer_in_their_protocol_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = serve_once(lambda asked: (10).to_bytes(4, "big") + asked[8:12] + bytes(6))  # the correlation id
    monkeypatch.setenv("KAFKA_BOOTSTRAP", versions)
    monkeypatch.setenv("TRITON_URL", "http://" + serve_once(b"HTTP/1.0 200 OK\r\n\r\n"))
    monkeypatch.setenv("REDIS_URL", "redis://" + serve_once(b"+PONG\r\n"))
    assert [f.status for f in examine_services()] == ["ok"] * 3


def test_a_triton_that_loads_and_a_broker_that_is_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = b"HTTP/1.0 400 Bad Request\r\n\r\n"
    monkeypatch.setenv("KAFKA_BOOTSTRAP", serve_once(refusal))
    monkeypatch.setenv("TRITON_URL", "http://" + serve_once(refusal))
    monkeypatch.delenv("REDIS_URL", raising=False)
    kafka, triton, _ = examine_services()
    assert (kafka.status, "not in Kafka's protocol" in kafka.detail) == ("warn", True)
    assert (triton.status, "answers 400: not ready" in triton.detail) == ("warn", True)
