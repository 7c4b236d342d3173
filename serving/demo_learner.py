"""`plexrank learn` beside a demo's server: a process of its own, as it would be anywhere else."""

from __future__ import annotations

import sys
import time
import urllib.request
from pathlib import Path
from typing import Self

import yaml

from engine.config import Config
from engine.errors import PlexrankError
from serving.child import Child
from serving.dev_broker import free_port

_SECONDS = 60.0
_READS = "plexrank_learner_lag_records{"  # a learner says it of each partition once it has read from it


def write_config(config: Config, path: Path) -> Path:
    """A configuration as a file that any command takes."""
    stated = config.model_dump(mode="json", exclude_unset=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# Written by `plexrank demo`: what it serves and learns.\n" + yaml.safe_dump(stated, sort_keys=False)
    )
    return path


class DemoLearner:
    """Learns from the newest record on: what was ranked to take the time is no lesson."""

    def __init__(self, config: Path, out: Path) -> None:
        """config: file; out: the demo's folder, with `models` (the registry) and `state` (the server's)."""
        self.words = out / "learner.log"
        self._port = free_port()
        folders = ["--models", str(out / "models"), "--state-dir", str(out / "state"), "--out", str(out / "learner")]
        how = ["--reset-to", "latest", "--metrics-port", str(self._port)]
        command = [sys.executable, "-P", "-m", "engine", "learn", str(config), *folders, *how]
        self._child = Child(command, self.words)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def trouble(self) -> str | None:
        """Why it does not learn any more, in its own words; None while it runs."""
        ending = self._child.ending
        return f"the learner ended ({ending}): {self._child.last_words() or 'it said nothing'}" if ending else None

    def wait_until_it_reads(self) -> None:
        """PlexrankError where it ends before, or takes a minute."""
        until = time.monotonic() + _SECONDS
        while not self._reads():
            trouble = self.trouble
            if trouble is not None:
                raise PlexrankError(f"{trouble}\nAll that it said is in {self.words}")
            if time.monotonic() > until:
                raise PlexrankError(f"the learner does not read the log after {_SECONDS:.0f} s; see {self.words}")
            time.sleep(0.05)

    def _reads(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=2) as answer:
                return _READS in answer.read().decode()
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()
