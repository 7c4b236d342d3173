"""Runs `plexrank learn` again and again and kills it with SIGKILL at random points; then lets it come to its end.

`python -m tests.faults.learner_lives KILLS SEED AUDIT RECORD ARGUMENT...` prints the number of kills. Each life is a
process of its own, forked from this one so that torch is imported once; nothing else is shared but the files.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.faults.forked import become


def main() -> None:
    kills, seed, record = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    audit, arguments = Path(sys.argv[3]), sys.argv[5:]
    chance = random.Random(seed)
    done = 0
    while True:
        child = _live(arguments)
        if done < kills and _killed(child, audit, record * chance.randint(1, 5), chance):
            done += 1
            continue
        if done < kills:
            break  # it came to its end before
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the last life failed"
        break
    print(f"kills {done}")


def _live(arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    become(arguments)


def _killed(child: int, audit: Path, growth: int, chance: random.Random) -> bool:
    """Kills a life when its audit has grown by so many bytes since the life cut it to its checkpoint, or in one case of
    six while it begins; a little later each time, so that writes of checkpoints are hit too. False: it had ended."""
    early, pause = chance.random() < 1 / 6, 0.05 * chance.random() ** 2
    least, begun = None, time.monotonic()
    while True:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        size = audit.stat().st_size if audit.exists() else 0
        least = size if least is None else min(least, size)
        if size >= least + growth or (early and time.monotonic() - begun > 0.3):
            break
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    main()
