"""The installer: one pip command, a second run that does nothing, and a command to type where it cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with what the installer reads."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "packaging", folder / "packaging", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    for name in ("pyproject.toml", "requirements.lock", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def install(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "packaging/environment.sh"],
        cwd=clone, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip


def with_environment(clone: Path) -> Path:
    """A `.venv` whose python notes how it was called."""
    notes = clone / "calls"
    script(clone / ".venv" / "bin" / "python", f'echo "$*" >>{notes}')
    script(clone / ".venv" / "bin" / "plexrank", "")
    return notes


def test_one_pip_command_brings_all_and_a_second_run_does_nothing(clone: Path) -> None:
    notes = with_environment(clone)
    assert install(clone).returncode == 0
    calls = notes.read_text().splitlines()
    (pip,) = [call for call in calls if "pip install" in call]
    assert pip.endswith("-c requirements.lock ./packaging/fbgemm-gpu -e .[dev]")
    assert any("pip check" in call for call in calls)
    notes.unlink()
    assert install(clone).returncode == 0
    assert not notes.exists()


def test_changed_requirements_install_again(clone: Path) -> None:
    notes = with_environment(clone)
    install(clone)
    notes.unlink()
    with (clone / "requirements.lock").open("a") as lock:
        lock.write("six==1.17.0\n")
    install(clone)
    assert "pip install" in notes.read_text()


def test_a_gpu_takes_the_real_fbgemm_and_torch_may_come_from_elsewhere(clone: Path) -> None:
    notes = with_environment(clone)
    assert install(clone, GPU="1", TORCH_INDEX="file:///wheels").returncode == 0
    (pip,) = [call for call in notes.read_text().splitlines() if "pip install" in call]
    assert pip.endswith("-c requirements.lock --extra-index-url file:///wheels -e .[dev,gpu]")


def test_a_failed_installation_is_tried_again(clone: Path) -> None:
    with_environment(clone)
    script(clone / ".venv" / "bin" / "python", 'case "$*" in *"pip install"*) exit 1;; esac')
    assert install(clone).returncode != 0
    assert not (clone / ".venv" / ".installed").exists()


def test_an_old_python_is_told_what_is_needed(clone: Path) -> None:
    old = script(clone / "bin" / "python3", "exit 1")
    answer = install(clone, PYTHON=str(old))
    assert answer.returncode != 0
    assert f"plexrank needs Python 3.11 or newer; PYTHON={old} is not" in answer.stderr


def test_without_any_new_python_the_command_is_shown(clone: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        script(clone / "bin" / name, "exit 1")
    answer = install(clone, PATH=f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert answer.returncode != 0
    assert "sudo apt-get install python3.11 python3.11-venv && make PYTHON=python3.11" in answer.stderr


def test_a_python_that_cannot_make_environments_is_told_the_package(clone: Path) -> None:
    """As Debian's python3 without python3-venv and without pip, for somebody who is not root."""
    python = script(
        clone / "bin" / "python3",
        f'case "$*" in *venv*|*virtualenv*|*pip*) exit 1;; esac\nexec {sys.executable} "$@"',
    )
    script(clone / "bin" / "id", "echo 1000")
    answer = install(clone, PYTHON=str(python), PATH=f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert answer.returncode != 0
    version = ".".join(map(str, sys.version_info[:2]))
    assert answer.stderr.splitlines()[-1].strip() == f"sudo apt-get install python{version}-venv"
    assert not (clone / ".venv").exists()


def test_a_python_without_ensurepip_is_filled_by_another_pip(clone: Path) -> None:
    """`python3 -m venv` fails, but the system has pip: it can fill an environment that has none."""
    notes = clone / "calls"
    fake = f"""echo "$*" >>{notes}
case "$*" in
    -c*) exec {sys.executable} "$@";;
    "-m venv --without-pip .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
    "-m venv .venv"|*virtualenv*) exit 1;;
esac"""
    python = script(clone / "bin" / "python3", fake)
    answer = install(clone, PYTHON=str(python))
    assert answer.returncode == 0, answer.stderr
    calls = notes.read_text().splitlines()
    assert "-m pip --python .venv/bin/python install -q pip" in calls


def test_the_lock_has_every_requirement_of_the_trio() -> None:
    lock = (ROOT / "requirements.lock").read_text().lower().replace("_", "-").splitlines()
    assert {"torch==2.13.0", "torchrec==1.8.0", "fbgemm-gpu-cpu==1.8.0"} <= set(lock)
    assert all(line.count("==") == 1 and "@" not in line and "://" not in line for line in lock)


def test_the_lock_covers_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()
    }
    missing = [w for w in wanted if w.split(">")[0].split("=")[0].split("[")[0].lower() not in names]
    assert missing == ["fbgemm-gpu==1.8.0"]  # the stand-in, from packaging/


def test_the_stand_in_has_the_versions_name_and_one_dependency() -> None:
    project = tomllib.loads((ROOT / "packaging/fbgemm-gpu/pyproject.toml").read_text())
    assert (project["project"]["name"], project["project"]["version"]) == ("fbgemm-gpu", "1.8.0")
    assert project["project"]["dependencies"] == ["fbgemm-gpu-cpu==1.8.0"]
    assert project["tool"]["setuptools"]["packages"] == []


def test_the_environment_has_no_conflicts() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
