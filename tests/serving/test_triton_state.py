"""What a launched server writes down: for its owner alone; a file that is not ours ends and removes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.errors import PlexrankError
from serving.triton import shm
from serving.triton.state import FILE, Identity, State


def state_of(folder: Path) -> State:
    me = Identity.of(os.getpid())
    assert me is not None
    return State("ready", me, "repository", "127.0.0.1:1", {}, shm.prefix_of(folder), "wheel", control="a secret")


def test_nobody_else_reads_the_secret_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between the file's coming and a change of its mode."""
    seen, replace = [], os.replace

    def seeing(source: Any, goal: Any) -> None:
        replace(source, goal)
        seen.append(Path(goal).stat().st_mode & 0o777)

    monkeypatch.setattr(os, "replace", seeing)
    state_of(tmp_path).write(tmp_path)
    assert seen == [0o600]
    assert State.read(tmp_path) == state_of(tmp_path)


@pytest.mark.parametrize("prefix", ["", "/", "psm_", None])
def test_a_file_that_names_others_shared_memory_is_refused(tmp_path: Path, prefix: str | None) -> None:
    """All processes and files of that prefix are ended and removed when a server is: none but ours may be meant."""
    state_of(tmp_path).write(tmp_path)
    held = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(held | {"prefix": prefix}))
    with pytest.raises(PlexrankError, match=r"not a state of `plexrank triton up`.*remove it"):
        State.read(tmp_path)
