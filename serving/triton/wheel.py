"""The package that carries tritonserver: where it is, and how it comes there. Nothing of its Python API is used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.doctor.triton import BINARY, wheel_folder
from engine.errors import PlexrankError
from engine.files import sha256

NAME, VERSION = "nvidia-pytriton", "0.7.0"
"""Carries tritonserver 2.51.0 with the python backend, for Linux on x86-64 with glibc 2.35 or newer."""
SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
"""Of its one wheel: pip takes no other, wherever it comes from."""
_INFO = f"nvidia_pytriton-{VERSION}.dist-info"


@dataclass(frozen=True)
class Wheel:
    """What is used of an installed wheel."""

    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / BINARY

    @property
    def tree(self) -> Path:
        """Folder with bin, backends, caches and python_backend_stubs."""
        return self.server.parents[1]

    @property
    def libraries(self) -> Path:
        """What the server is linked with and no system has to have."""
        return self.folder / "nvidia_pytriton.libs"

    @property
    def pythons(self) -> list[str]:
        """Versions of Python that it has a stub for, such as `3.11`, in order."""
        found = [p.parent.name for p in self.tree.glob("python_backend_stubs/*/triton_python_backend_stub")]
        return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def find_wheel(folder: Path | None = None) -> Wheel:
    """The one that is installed. PlexrankError where it is missing or another version, with the command."""
    folder = folder or wheel_folder()
    wheel = Wheel(folder)
    command = "plexrank triton install" + ("" if folder == wheel_folder() else f" --dir {folder}")
    if not wheel.server.is_file():
        raise PlexrankError(f"{folder}: no Triton server is installed there; run: {command}")
    if not (folder / _INFO).is_dir():
        found = ", ".join(sorted(p.name for p in folder.glob("nvidia_pytriton-*.dist-info"))) or "no dist-info"
        raise PlexrankError(f"{folder}: not {NAME} {VERSION} ({found}); remove that folder and run: {command}")
    return wheel


def install_wheel(folder: Path | None = None, file: Path | None = None) -> tuple[Wheel, bool]:
    """Brings the pinned version with pip, by its sha256, as a whole or not at all -> (wheel, whether it came now).

    file: the wheel itself, for a machine without a package index. PlexrankError with pip's last line.
    """
    folder = folder or wheel_folder()
    try:
        return find_wheel(folder), False
    except PlexrankError:
        if folder.exists() and any(folder.iterdir()):
            raise
    if sys.platform != "linux":
        raise PlexrankError(f"{NAME} {VERSION} is for Linux on x86-64; elsewhere use a Triton of your own by its URL")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        wanted = scratch / "requirements.txt"
        wanted.write_text(f"{_from_file(file) if file else f'{NAME}=={VERSION}'} --hash=sha256:{SHA256}\n")
        _pip(
            [
                "--target",
                str(scratch / "wheel"),
                "--require-hashes",
                "-r",
                str(wanted),
                *(["--no-index"] if file else []),
            ]
        )
        find_wheel(scratch / "wheel")
        if folder.exists():
            folder.rmdir()
        (scratch / "wheel").rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return find_wheel(folder), True


def _from_file(file: Path) -> str:
    """As a requirement."""
    if not file.is_file():
        raise PlexrankError(
            f"{file}: no such file; on a machine with an index: pip download --no-deps {NAME}=={VERSION}"
        )
    if not re.fullmatch(rf"nvidia_pytriton-{re.escape(VERSION)}-.*\.whl", file.name):
        raise PlexrankError(f"{file}: not the wheel of {NAME} {VERSION}, nvidia_pytriton-{VERSION}-*.whl")
    if sha256(file) != SHA256:
        raise PlexrankError(
            f"{file}: not the wheel of {NAME} {VERSION} that was tested: its sha256 is another; refused"
        )
    return f"{NAME} @ {file.resolve().as_uri()}"


def _pip(arguments: list[str]) -> None:
    quiet = ["--quiet", "--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *quiet, *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("PIP_TARGET", "PIP_USER")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if run.returncode == 0:
        return
    said = [line for line in (run.stderr + run.stdout).splitlines() if line.strip()] or [f"pip ended {run.returncode}"]
    if any("DO NOT MATCH THE HASHES" in line for line in said):
        raise PlexrankError(f"what the index gives for {NAME} {VERSION} is not the wheel that was tested; refused")
    remedy = "run: python -m ensurepip" if "No module named pip" in said[-1] else "offline: --wheel FILE"
    raise PlexrankError(f"{NAME} {VERSION} could not be installed: {said[-1].strip()} ({remedy})")
