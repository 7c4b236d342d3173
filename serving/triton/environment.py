"""What the server's process finds in its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from serving.triton.backends import library_folder
from serving.triton.wheel import Wheel

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""glibc keeps the memory of large temporaries: else each request maps, faults in and gives back the same pages."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def server_environment(wheel: Wheel, threads: int = 1, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """threads: of one model instance; base: default this process' environment, whose malloc settings go first.

    The embedded interpreter finds its packages by the `python3` that is first on PATH, and ignores PYTHON*.
    """
    inherited = dict(os.environ if base is None else base)
    libraries = [library_folder(), wheel.libraries, inherited.get("LD_LIBRARY_PATH")]
    path = [Path(sys.executable).parent, inherited.get("PATH") or os.defpath]
    return {
        **MALLOC,
        **inherited,
        **{name: str(threads) for name in _THREADS},
        "LD_LIBRARY_PATH": os.pathsep.join(str(part) for part in libraries if part),
        "PATH": os.pathsep.join(map(str, path)),
    }
