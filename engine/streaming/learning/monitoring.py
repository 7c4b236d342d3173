"""A copy of the learner's positions in the log, for whoever watches lag; the checkpoint alone says where it goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.components import Capability, EventLog
from engine.errors import CheckpointError, EventError

log = logging.getLogger("plexrank.learning")


def group_of(model: str) -> str:
    """The group's name under which a model's learners write their positions down."""
    return f"plexrank.{model}"


class PositionsCopy:
    """Writes the newest positions as a group's offsets, in a thread of its own: a broker that is slow holds up no
    learner. What cannot be written is left out; the next checkpoint's positions replace it.
    """

    def __init__(self, source: EventLog, model: str) -> None:
        self._source, self._group = source, group_of(model)
        self._newest: dict[int, int] | None = None
        self._wake, self._stopping = threading.Condition(), False
        self._failed = False
        self._thread: threading.Thread | None = None

    def write(self, positions: Mapping[int, int]) -> None:
        """After the checkpoint that holds them; does not block."""
        if not positions or Capability.GROUPS not in self._source.capabilities:
            return
        with self._wake:
            self._newest = dict(positions)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="plexrank-positions", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """The last ones are written, where the log answers within its timeout."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._newest is not None or self._stopping)
                newest, self._newest = self._newest, None
            if newest is None:
                return
            try:
                self._source.note(self._group, newest)
                self._failed = False
            except EventError as error:
                if not self._failed:
                    log.warning("the copy of the positions in group %s is not written: %s", self._group, error)
                self._failed = True


def checkpointed(out: Path) -> tuple[str, dict[int, int]]:
    """(the log's identity, partition -> next offset) of a learner's newest whole checkpoint, beside a running learner.

    CheckpointError where there is none.
    """
    from engine.streaming.learning.checkpointing import beside

    root = out / "checkpoints"
    found = beside(root)
    state: dict[str, Any] = {} if found is None else found.state
    if "positions" not in state:
        raise CheckpointError(
            f"{root}: holds no learner's checkpoint; name the folder that is --out of `plexrank learn`"
        )
    return str(state["identity"]), {int(p): int(offset) for p, offset in state["positions"].items()}
