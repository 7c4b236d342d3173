"""Cores, memory and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from engine.doctor.finding import Finding

LEAST_MEMORY = 2 << 30
LEAST_DISK = 2 << 30
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


def examine_machine() -> list[Finding]:
    """What training and serving will have to do with."""
    return [_cpu(), _memory(), *_disks()]


def _cpu() -> Finding:
    cores, threads = _usable_cores(), os.environ.get("OMP_NUM_THREADS")
    known = [name for name in INSTRUCTIONS if name in _cpu_flags()]
    text = f"{cores} cores usable of {os.cpu_count()}; {', '.join(known) or 'instruction sets unknown'}"
    return Finding("cpu", "ok", text + (f"; OMP_NUM_THREADS={threads}" if threads else ""))


def _usable_cores() -> int:
    """Cores that this process may use: its affinity and the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        return set()
    return set()


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = free if limit == "max" else min(free, int(limit) - used)
    except (OSError, ValueError):
        pass  # no control group of version 2: what the system says counts
    text = f"{_gib(free)} free of {_gib(psutil.virtual_memory().total)}"
    if free < LEAST_MEMORY:
        return Finding(
            "memory", "warn", f"{text}; training MovieLens-100k needs about 1 GiB", "free -h; ps aux --sort=-rss | head"
        )
    return Finding("memory", "ok", text)


def _disks() -> list[Finding]:
    findings = []
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{_gib(free)} free in {folder}"
        if free >= LEAST_DISK:
            findings.append(Finding(name, "ok", text))
        else:
            findings.append(Finding(name, "warn", text, f"df -h {folder}; du -sh {folder}/* | sort -h | tail"))
    return findings


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
