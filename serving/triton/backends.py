"""The backends that the server gets: the python backend, with the stub of the Python that runs."""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from pathlib import Path

from engine.errors import PlexrankError
from serving.triton.wheel import Wheel

_STUB = "triton_python_backend_stub"


def make_backends(wheel: Wheel, folder: Path) -> Path:
    """Makes `folder` with three links, which the wheel lacks: library, utilities, and the stub beside them.

    PlexrankError where the wheel has no stub for this Python, or the stub cannot find Python's library.
    """
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running not in wheel.pythons:
        raise PlexrankError(
            f"{wheel.folder}: no python backend for Python {running}; it has {', '.join(wheel.pythons)}: "
            "install plexrank for one of these"
        )
    library_folder()
    home = folder / "python"
    home.mkdir(parents=True, exist_ok=True)
    backend = wheel.tree / "backends" / "python"
    for name, goal in {
        "libtriton_python.so": backend / "libtriton_python.so",
        "triton_python_backend_utils.py": backend / "triton_python_backend_utils.py",
        _STUB: wheel.tree / "python_backend_stubs" / running / _STUB,
    }.items():
        link = home / name
        link.unlink(missing_ok=True)
        link.symlink_to(goal.resolve())
    return folder


def library_folder() -> Path | None:
    """Folder of libpython3.X.so, which the stub is linked with; None where the system's loader finds it by itself.

    PlexrankError where there is none, as with a Python that is linked statically.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), Path(sys.base_prefix) / "lib"]
    for place in filter(None, places):
        if (Path(place) / name).is_file():
            return Path(place)
    try:
        ctypes.CDLL(name)
    except OSError:
        package = name.removesuffix(".so.1.0")
        raise PlexrankError(
            f"{name} is missing: Triton's python backend needs it, and {sys.executable} does without; "
            f"run: apt-get install {package}, or use a Python that was built with --enable-shared"
        ) from None
    return None
