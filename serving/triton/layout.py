"""Where things lie in a model repository, and beside it; of imports no more than every process can pay for.

REPOSITORY/<model>/config.pbtxt
REPOSITORY/<model>/<number>/   model.py, bundle/, selftest.safetensors: a version, never changed once it is there
LIVE/<model>/<number>/         the memory that its instances score from and that deltas are applied to
LIVE/<model>.follow.json       what the process says that follows a learner

Triton loads all versions of a model again when a file in its folder is changed, linked or added; so nothing that
changes lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "config.pbtxt"
MODEL = "model.py"
BUNDLE = "bundle"
LIVE = "PLEXRANK_TRITON_LIVE"
"""Environment variable: the live folder, before what `config.pbtxt` says."""
_LOCK = ".plexrank.lock"


def lock_of(repository: Path) -> Path:
    """Held by whoever changes the repository. A file: Triton takes each folder there for a model."""
    return repository / _LOCK


def version_numbers(model: Path) -> list[int]:
    """Of a model's folder, in order; nothing where there is none."""
    if not model.is_dir():
        return []
    return sorted(int(p.name) for p in model.iterdir() if p.name.isdecimal() and p.is_dir())


def live_root(repository: Path, stated: str = "") -> Path:
    """The live folder of a repository. stated: as `config.pbtxt` says it, from the repository on."""
    repository = Path(os.path.abspath(repository))
    place = os.environ.get(LIVE) or stated
    return Path(os.path.normpath(repository / place)) if place else repository.with_name(f"{repository.name}-live")


def follow_status(live: Path, model: str) -> Path:
    """The file that a following process renews."""
    return live / f"{model}.follow.json"
