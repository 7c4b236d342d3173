"""Where the peers are installed: `python -m benchmarks.peers.environment` makes `.venv-peers`, once.

They have an environment of their own, because they pin versions that would not fit ours. Run with the interpreter that
made `.venv`, so that both have the same Python and the same torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"
PYTHON = FOLDER / "bin" / "python"
HERE = Path(__file__).parent
STAMP = FOLDER / "installed.txt"


def missing() -> str | None:
    """Why peers cannot run, or None."""
    if not PYTHON.exists() or not STAMP.exists() or STAMP.read_text() != wanted():
        return "the peers' environment is not there: run `python -m benchmarks.peers.environment`"
    return None


def wanted() -> str:
    return (HERE / "requirements.txt").read_text()


def install() -> None:
    """Makes the environment, if what is there is not what is wanted."""
    if missing() is None:
        return
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")], check=True)
    STAMP.write_text(wanted())


def train(peer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one peer's script on one thread. -> the JSON object that it prints last.

    RuntimeError with the end of its error output if it fails.
    """
    return last_object([str(PYTHON), str(HERE / f"{peer}.py")], options)


def last_object(command: list[str], options: Mapping[str, Any], **variables: str) -> dict[str, Any]:
    """A process that reads its options from the last argument (JSON) and prints a JSON object last.

    variables: of its environment, beside ours.
    """
    environment = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [*command, json.dumps(dict(options))], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    install()
    print(f"peers are installed in {FOLDER}")
