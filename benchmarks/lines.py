"""What all benchmarks share: their options, their JSON lines, and what is told of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "numpy")


def arguments(
    description: str, argv: Sequence[str] | None, *, seeds: int = 3, extra: dict[str, dict[str, Any]] | None = None
) -> argparse.Namespace:
    """`--quick`, `--seeds N` and the benchmark's own options; `quick` lowers the seeds to one unless they are named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small and short: shows that it runs; targets are not judged"
    )
    parser.add_argument("--seeds", type=int, default=None, help=f"seeds 1..N (default {seeds}, 1 with --quick)")
    for name, options in (extra or {}).items():
        parser.add_argument(name, **options)
    options = parser.parse_args(argv)
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds: at least 1")
    if options.seeds is None:
        options.seeds = 1 if options.quick else seeds
    return options


def one_thread() -> None:
    """Makes this process, and what it starts, compute on one thread. Call before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


class Report:
    """The lines of one benchmark; `code` is 1 if one of them missed its target."""

    def __init__(self, bench: str, *, quick: bool) -> None:
        self.bench, self.quick = bench, quick
        self.missed: list[str] = []
        self._started = time.perf_counter()

    def tell(self, what: str) -> None:
        """Progress, on stderr."""
        print(f"[{time.perf_counter() - self._started:7.1f} s] {what}", file=sys.stderr, flush=True)

    def line(
        self,
        case: str,
        *,
        ours: Any,
        peer: Any = None,
        target: str | None = None,
        ok: bool | None = None,
        ratio: float | None = None,
        **more: Any,
    ) -> None:
        """One comparison. ok: None where there is no target; with --quick targets are shown and not judged."""
        judged = None if self.quick else ok
        if judged is False:
            self.missed.append(case)
        found = {"bench": self.bench, "case": case, "ours": ours, "peer": peer, "ratio": ratio, "target": target}
        print(json.dumps(plain({**found, "ok": judged, "quick": self.quick, **more})), flush=True)

    def skip(self, case: str, why: str) -> None:
        """A comparison that this machine cannot make, with the reason."""
        print(json.dumps({"bench": self.bench, "case": case, "skipped": why, "ok": None}), flush=True)

    def end(self) -> int:
        """Prints the machine and what was missed. -> the exit status."""
        seconds = time.perf_counter() - self._started
        print(
            json.dumps({"bench": self.bench, "machine": machine(), "seconds": round(seconds, 1), "missed": self.missed})
        )
        return 1 if self.missed else 0


def plain(value: Any) -> Any:
    """JSON's own types, floats to six significant digits."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return float(f"{value:.6g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Processor, cores, threads, load and versions: ratios travel between machines, figures do not."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
