"""What compiled code and int8 tables save, in the process that an instance in Triton is.

    python -m benchmarks.triton_variants [--quick]

The network of configs/movielens-100k.yaml (DIN over full tables of width 16), one thread. The variants take turns with
the same requests; judged is the processor time of one, as the medians of all turns. The tables are shown in bytes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lines import Report, arguments, one_thread

one_thread()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.served_bundle import make_bundle  # noqa: E402
from engine.bundle import Bundle  # noqa: E402
from engine.components import ScoreRequest  # noqa: E402
from engine.inference.compiled import CompiledModel, Package, compile_rank  # noqa: E402
from engine.inference.live import LiveModel  # noqa: E402
from engine.inference.runtime import Runtime  # noqa: E402
from engine.inference.tensors import encode  # noqa: E402
from engine.memory import keep_freed_memory  # noqa: E402

SIZES = ((500, 50), (500, 20), (500, 0), (50, 20))


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__.splitlines()[0], argv, seeds=1)
    report = Report("triton_variants", quick=options.quick)
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder), report, rounds=3 if options.quick else 30)
    return report.end()


def _compare(folder: Path, report: Report, rounds: int) -> None:
    bundle = Bundle.open(make_bundle(folder / "bundle"))
    eager = LiveModel.open(folder / "float32", bundle)
    report.tell("compiling")
    begin = time.perf_counter()
    compile_rank(eager.model, folder / "rank.pt2")
    seconds = time.perf_counter() - begin
    package = Package(folder / "rank.pt2")
    report.line("compile_s", ours=seconds, package_bytes=(folder / "rank.pt2").stat().st_size)
    lives = {
        "eager": eager,
        "aoti": LiveModel.open(folder / "float32", bundle, over=lambda model: CompiledModel(model, package)),
        "int8": LiveModel.open(folder / "int8", bundle, tables="int8"),
    }
    sizes = {name: sum(t.nbytes for t in live.model.embedding.weights.values()) for name, live in lives.items()}
    report.line("table_bytes", ours=sizes["int8"], peer=sizes["eager"], ratio=sizes["int8"] / sizes["eager"])
    for candidates, history in SIZES:
        _time(report, lives, bundle, candidates, history, rounds)


def _time(
    report: Report, lives: dict[str, LiveModel], bundle: Bundle, candidates: int, history: int, rounds: int
) -> None:
    rng = np.random.default_rng(0)
    requests = [_request(bundle, rng, candidates, history) for _ in range(10)]
    runtimes = {name: Runtime(lambda live=live: live.now) for name, live in lives.items()}
    answers = {name: runtime.score(requests) for name, runtime in runtimes.items()}
    spent: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(rounds):
        for name, runtime in runtimes.items():
            for request in requests:
                begin = time.process_time()
                runtime.infer(request)
                spent[name].append(time.process_time() - begin)
    ms = {name: 1e3 * float(np.median(times)) for name, times in spent.items()}
    for name in ("aoti", "int8"):
        off = max(
            float(np.abs(ours[task] - its[task]).max())
            for ours, its in zip(answers[name], answers["eager"], strict=True)
            for task in bundle.schema.tasks
        )
        case = f"{name} cpu_ms {candidates}x{history}"
        report.line(case, ours=ms[name], peer=ms["eager"], ratio=ms[name] / ms["eager"], scores_off_by=off)


def _request(bundle: Bundle, rng: np.random.Generator, candidates: int, history: int) -> dict[str, np.ndarray]:
    known, item = bundle.catalogue.ids(np.arange(len(bundle.catalogue))), bundle.schema.item
    picked = [known[k] for k in rng.permutation(len(known))[: candidates + history]]
    past = {item: picked[candidates:]} if item and history else {}
    request = ScoreRequest({"user_id": str(rng.integers(1000))}, past, picked[:candidates])
    return encode(request, bundle.encoder, bundle.catalogue, items_apart=False)


if __name__ == "__main__":
    sys.exit(main())
