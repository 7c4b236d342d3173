"""A process beside this one that ends when this one does, kill -9 included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_LAUNCH = """\
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that asked for this is gone")
try:
    os.execv(sys.argv[3], sys.argv[3:])
except OSError as error:
    sys.exit(f"{sys.argv[3]}: {error.strerror}")
"""
"""Asks the kernel for a signal at the parent's end (PR_SET_PDEATHSIG; exec keeps it), then becomes the command."""
_LAST = 4000


class Child:
    """A command with its own session, so that Ctrl-C reaches its parent alone, which then ends it in good order.

    On Linux the kernel kills it when the thread that started it ends: start it from one that lives as long as needed.
    """

    def __init__(
        self,
        command: Sequence[str],
        words: Path,
        environment: Mapping[str, str] | None = None,
        at_parents_end: signal.Signals = signal.SIGKILL,
        folder: Path | None = None,
    ) -> None:
        """words: file that gets all it says. OSError where it cannot be written.

        environment, folder (it works in): this process' own by default; at_parents_end: the signal that it gets then.
        """
        words.parent.mkdir(parents=True, exist_ok=True)
        self.words = words
        with words.open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(int(at_parents_end)), *command],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def ending(self) -> str:
        """The same in words; nothing while it runs."""
        status = self.ended
        if status is None:
            return ""
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def last_words(self, lines: int = 3) -> str:
        """The end of what it said."""
        with self.words.open("rb") as said:
            said.seek(max(0, self.words.stat().st_size - _LAST))
            text = said.read().decode(errors="replace")
        return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])

    def stop(self, seconds: float = 15.0) -> None:
        """SIGTERM, and SIGKILL where that does not help in time."""
        if self.ended is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
