"""Prepared data is kept by what it was made from; a folder that is not whole is made again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import Config

FORMAT = 1
"""Raised when the layout of prepared data changes."""

_EDGE = 1 << 20


def default_cache() -> Path:
    """`PLEXRANK_CACHE`, else `~/.cache/plexrank`."""
    return Path(os.environ.get("PLEXRANK_CACHE") or Path.home() / ".cache" / "plexrank")


def digest(config: Config, files: list[Path]) -> str:
    """What the prepared data depends on: the data section, the features without their widths, and the files."""
    told = {
        "format": FORMAT,
        "data": config.data.model_dump(mode="json"),
        "features": [f.model_dump(mode="json", exclude={"dim", "lookups"}) for f in config.features],
        "files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def cached(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` with `build` unless it is whole. Written aside and renamed; one process builds, others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if is_whole(folder):
            return
        for torn in (folder, *folder.parent.glob(f".{folder.name}-*")):  # a killed process left its own aside
            shutil.rmtree(torn, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(aside)
            (aside / "whole.json").write_text(json.dumps(_sums(aside)))
            os.replace(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def is_whole(folder: Path) -> bool:
    """Whether each file is there with its size and checksum (of its first and last MiB)."""
    try:
        told = json.loads((folder / "whole.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(told) and told == _sums(folder)


def _sums(folder: Path) -> dict[str, list[int]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "whole.json")
    return {str(p.relative_to(folder)): _sum(p) for p in files}


def _sum(path: Path) -> list[int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(_EDGE))
        if size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE))
            crc = zlib.crc32(file.read(_EDGE), crc)
    return [size, crc]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
