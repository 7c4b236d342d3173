"""Deltas are followed from when their log can be opened, whatever kept it from that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.errors import LogUnavailable, PlexrankError, PluginError
from engine.streaming.deltas.registry import ModelRegistry
from serving import following as module
from serving.following import Following
from tests.streaming.chain_world import wait_for
from tests.streaming.memory_log import MemoryLog


class Locked(MemoryLog):
    """Opens its streams from the third attempt on."""

    def __init__(self, error: PlexrankError) -> None:
        super().__init__()
        self.errors = [error, error]

    def sibling(self, name: str, **how: Any) -> Any:
        if self.errors:
            raise self.errors.pop()
        return super().sibling(name, **how)


@pytest.mark.parametrize("error", [LogUnavailable("away"), PluginError("the variable KAFKA_PASSWORD is not set")])
def test_a_log_that_cannot_be_opened_yet_is_opened_later(
    error: PlexrankError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    scorer = SimpleNamespace(version="a" * 12)
    service = cast("Any", SimpleNamespace(log=Locked(error), scorer=scorer))
    following = Following(service, ModelRegistry(tmp_path), lambda: None, lambda applied: None)
    following.start()
    try:
        wait_for(lambda: following.status() is not None, "it follows")
    finally:
        following.close()
