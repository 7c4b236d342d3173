"""What the launcher reads of a model repository: its models, their versions, and how many processes they start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from engine.errors import PlexrankError

CONFIG = "config.pbtxt"
_KEPT = 3
"""Versions of a model that are in memory at most: two that serve, one that loads."""


@dataclass(frozen=True)
class ModelFolder:
    """REPOSITORY/<model>: `config.pbtxt`, and a folder named by a number for each version."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def versions(self) -> list[int]:
        """In order."""
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir())

    def version(self, number: int | str) -> Path:
        return self.path / str(number)

    def instances(self) -> int:
        """Processes that all its versions may have at once. PlexrankError where `config.pbtxt` cannot be read."""
        config = self.path / CONFIG
        try:
            found = text_format.Parse(config.read_text("utf-8"), ModelConfig(), allow_unknown_field=True)
        except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
            raise PlexrankError(f"{config}: {error}; export the model again") from error
        if found.backend != "python":
            return 0
        return int(_KEPT * max(1, sum(max(1, group.count) for group in found.instance_group)))

    def touch(self, version: str) -> None:
        """So that Triton takes this version for a changed one, and loads it again beside the one it has."""
        os.utime(self.version(version) / "model.py")


def find_models(repository: Path) -> list[ModelFolder]:
    """In order of their names. PlexrankError where there is no such folder."""
    if not repository.is_dir():
        raise PlexrankError(f"{repository}: no such model repository; run: plexrank export triton BUNDLE {repository}")
    folders = [p for p in repository.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return [
        ModelFolder(p) for p in sorted(folders) if (p / CONFIG).exists() or any(c.name.isdecimal() for c in p.iterdir())
    ]
