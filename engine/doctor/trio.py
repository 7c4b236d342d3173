"""torch, torchrec and fbgemm are built for each other: versions that do not match fail at import, or worse, later."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

from engine.doctor.finding import Finding

TRIO = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"}
"""The set that plexrank is tested with. `fbgemm` is fbgemm-gpu-cpu on a machine without CUDA, fbgemm-gpu with it."""

MATCHING = "torch 2.13.0, torchrec 1.8.0, and fbgemm-gpu-cpu 1.8.0 (CPU) or fbgemm-gpu 1.8.0 (CUDA)"
PIP = f"{sys.executable} -m pip"
STAND_IN_FILES = 50
"""The real fbgemm-gpu has hundreds of files; the stand-in, which only brings fbgemm-gpu-cpu, a few of metadata."""

_PROBE = """
import torch, fbgemm_gpu
from torchrec import EmbeddingBagCollection
got = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2, 3])).tolist()
assert got == [0, 1, 3, 6], got
print(torch.backends.cpu.get_cpu_capability(), torch.version.cuda or "-", int(torch.cuda.is_available()))
"""


def examine_trio() -> list[Finding]:
    """Python, the versions of the three, which build of fbgemm, and a real operation of it in a process of its own."""
    python = Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    findings = [python, *_versions(), *_builds()]
    return [*findings, *_operation(versions_fit=all(f.status != "wrong" for f in findings))]


def installed_version(distribution: str) -> str | None:
    """Without a local part such as +cpu; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    findings = []
    for name, wanted in TRIO.items():
        distributions = ["fbgemm-gpu-cpu", "fbgemm-gpu"] if name == "fbgemm" else [name]
        found = {d: v for d in distributions if (v := installed_version(d))}
        distribution = next(iter(found), distributions[0])
        remedy = f"{PIP} install {'' if name == 'torch' else '--no-deps '}{distribution}=={wanted}"
        if not found:
            findings.append(Finding(name, "wrong", f"not installed; the matching set is {MATCHING}", remedy))
        elif found[distribution] != wanted:
            what = f"{distribution} {found[distribution]} does not fit the others; the matching set is {MATCHING}"
            findings.append(Finding(name, "wrong", what, remedy))
        else:
            findings.append(Finding(name, "ok", f"{distribution} {wanted}"))
    return findings


def _builds() -> list[Finding]:
    """Two builds over one another, or one that does not go with torch's."""
    cpu, gpu = installed_version("fbgemm-gpu-cpu"), installed_version("fbgemm-gpu")
    real = gpu is not None and not _is_stand_in()
    torch_is_cpu = _torch_is_cpu()
    if cpu and real:
        what = "fbgemm-gpu (CUDA) and fbgemm-gpu-cpu are both installed, and each overwrites the other's files"
        again = f"{PIP} uninstall -y fbgemm-gpu fbgemm-gpu-cpu && make install" + ("" if torch_is_cpu else " GPU=1")
        return [Finding("fbgemm build", "wrong", what, again)]
    if real and torch_is_cpu:
        what = "fbgemm-gpu (CUDA) beside a CPU build of torch"
        return [Finding("fbgemm build", "wrong", what, f"{PIP} uninstall -y fbgemm-gpu && make install")]
    if cpu and gpu is None:
        what = "torchrec asks for fbgemm-gpu, which is not there; it works, but `pip check` complains"
        return [Finding("fbgemm build", "warn", what, f"{PIP} install --no-deps ./packaging/fbgemm-gpu")]
    if cpu and gpu and cpu != gpu:
        what = f"the stand-in fbgemm-gpu is {gpu}, fbgemm-gpu-cpu is {cpu}"
        return [Finding("fbgemm build", "wrong", what, f"{PIP} install ./packaging/fbgemm-gpu")]
    return []


def _is_stand_in() -> bool:
    files = importlib.metadata.distribution("fbgemm-gpu").files or []
    return len(files) < STAND_IN_FILES


def _torch_is_cpu() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _operation(*, versions_fit: bool) -> list[Finding]:
    """A process of its own, since a wrong pair may end its process instead of raising."""
    remedy = "" if not versions_fit else f"{PIP} install --force-reinstall --no-deps fbgemm-gpu-cpu=={TRIO['fbgemm']}"
    try:
        run = subprocess.run(  # noqa: S603
            [sys.executable, "-W", "ignore", "-c", _PROBE], capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding("fbgemm operators", "warn", "importing them took more than 180 s: a slow disk?")]
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"]
        return [Finding("fbgemm operators", "wrong", f"do not work: {lines[-1][:300]}", remedy)]
    capability, cuda, gpu = run.stdout.split()
    findings = [
        Finding("fbgemm operators", "ok", "loaded and tried"),
        Finding("torch on this CPU", "ok" if capability != "DEFAULT" else "warn", f"kernels for {capability}"),
    ]
    if gpu == "1" and installed_version("fbgemm-gpu-cpu"):
        what = f"torch sees a GPU (CUDA {cuda}), but fbgemm is the CPU build: tables stay on the CPU"
        findings.append(
            Finding("gpu", "warn", what, f"{PIP} uninstall -y fbgemm-gpu fbgemm-gpu-cpu && make install GPU=1")
        )
    elif gpu == "1":
        findings.append(Finding("gpu", "ok", f"CUDA {cuda}"))
    else:
        findings.append(Finding("gpu", "info", "none that torch can use; training runs on the CPU"))
    return findings
