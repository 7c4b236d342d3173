"""One learner a partition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from engine.errors import EventError
from engine.files import Held, hold


class PartitionLocks:
    """Locked files, one a partition; they go with the process, kill -9 included. EventError names who has one."""

    def __init__(self, folder: Path, partitions: Sequence[int]) -> None:
        self._files: list[IO[str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for partition in partitions:
                self._files.append(_locked(folder / f"partition-{partition:05d}.lock", _taken(partition)))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


class FolderLock:
    """One learner a folder of checkpoints. EventError names who has it."""

    def __init__(self, folder: Path) -> None:
        def refusal(holder: str, path: Path) -> str:
            return f"{folder}: {holder} writes its checkpoints there ({path}): give this learner another --out"

        folder.mkdir(parents=True, exist_ok=True)
        self._file = _locked(folder / "learner.lock", refusal)

    def release(self) -> None:
        self._file.close()


def _locked(path: Path, refusal: Callable[[str, Path], str]) -> IO[str]:
    try:
        return hold(path)
    except Held as held:
        raise EventError(refusal(held.holder, path)) from None


def _taken(partition: int) -> Callable[[str, Path], str]:
    def refusal(holder: str, path: Path) -> str:
        return (
            f"partition {partition} is learnt from by {holder} already ({path}): stop it, or share the partitions out "
            "with --partitions; two learners would train every event twice"
        )

    return refusal
