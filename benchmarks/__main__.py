"""All benchmarks, one after another: `python -m benchmarks [NAME ...] [--quick] [--seeds N]`, as in `make bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = (
    "quality_movielens",
    "multiplexing",
    "criteo",
    "training_speed",
    "serving_latency",
    "stream_rate",
    "freshness",
    "delta_latency",
    "online_learning",
    "triton_serving",
    "triton_variants",
)
OTHERS = ("memory_of_rows",)
"""Scripts with options of their own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Each in a process of its own; the status is 1 if one of them failed or missed a target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS + OTHERS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that they run")
    parser.add_argument("--seeds", type=int, help="seeds 1..N, where a benchmark has seeds")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(COMMANDS + OTHERS))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(COMMANDS + OTHERS)}")
    wanted = options.names or COMMANDS + OTHERS
    failed = [name for name in wanted if subprocess.run(command(name, options), cwd=ROOT).returncode]
    if failed:
        print(f"failed, or missed a target: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def command(name: str, options: argparse.Namespace) -> list[str]:
    if name in OTHERS:
        return [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
    seeds = ["--seeds", str(options.seeds)] if options.seeds else []
    return [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if options.quick else []), *seeds]


if __name__ == "__main__":
    sys.exit(main())
