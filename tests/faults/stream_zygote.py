"""Runs `plexrank` commands as processes that are forked from this one, so that torch is imported once.

`python -m tests.faults.stream_zygote` reads a JSON object a line: {"start": [ARGUMENT...], "output": FILE, "errors":
FILE, "clock": FILE or null} -> {"pid": n}; {"ended": n} -> {"code": exit status, negative: by a signal; null: it runs}.
clock: a file with the seconds, a double, by which `time.time` of that process is wrong; read at each look at the clock.
When its input ends, it kills what still runs.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import time
from typing import Any

import serving.cli  # noqa: F401
from tests.faults.forked import become


def main() -> None:
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            pid = _live(asked)
            codes[pid] = None
            print(json.dumps({"pid": pid}), flush=True)
        else:
            pid = asked["ended"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            print(json.dumps({"code": codes[pid]}), flush=True)
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)


def _live(asked: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it goes with this process
    _redirect(os.devnull, 0, os.O_RDONLY)
    _redirect(asked["output"], 1, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _redirect(asked["errors"], 2, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if asked["clock"]:
        _bend_clock(asked["clock"])
    become(asked["start"])


def _redirect(path: str, number: int, how: int) -> None:
    opened = os.open(path, how, 0o644)
    os.dup2(opened, number)
    os.close(opened)


def _bend_clock(path: str) -> None:
    with open(path, "rb") as file:
        wrong = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    right = time.time
    time.time = lambda: right() + struct.unpack("d", wrong[:8])[0]


if __name__ == "__main__":
    main()
