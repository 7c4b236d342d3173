"""Training speed: DIN beside FuxiCTR and DeepCTR-Torch; 26 large tables beside them and beside a bare TorchRec loop.

Everybody trains the same rows on one thread, in a process of its own, in turns, so that all meet the same noise; ratios
are medians over the turns. Optimizers differ and that is the point: ours is fused row-wise Adagrad (touches the rows of
the batch) with Adam for the network; the peers' is dense Adam over every row of every table.

Rows a second of *processor time* are judged: a busy machine does not touch them, and our thread that prepares batches
counts as well. Wall time stands beside.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.lines import Report, arguments, one_thread

one_thread()

from benchmarks.bare.bandwidth import copy_bytes_per_second, gather_bytes_per_second  # noqa: E402
from benchmarks.large_tables import DIM, HIDDEN, SIZES, make  # noqa: E402
from benchmarks.peers import environment  # noqa: E402
from benchmarks.peers.export import export  # noqa: E402
from benchmarks.runs import installed, load_config, prepare  # noqa: E402

HERE = Path(__file__).parent
DIN = HERE / "configs" / "din-100k.yaml"
DIN_FEATURES = ["user_id", "age", "gender", "occupation", "year"]
BATCH = 1024

KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""What the engine tells glibc (`engine.memory`), for a bare loop that knows the trick."""

Result = dict[str, Any]


def ours(config: Path, overrides: dict[str, Any], seed: int) -> Result:
    """This engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ours"]
    return environment.last_object(command, {"config": str(config), "overrides": overrides, "seed": seed})


def turns(report: Report, contestants: dict[str, Callable[[int], Result]], seeds: int) -> dict[str, list[Result]]:
    """Each contestant once a seed, one after another."""
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    for seed in range(1, seeds + 1):
        for name, run in contestants.items():
            result = run(seed)
            found[name].append(result)
            quality = f", AUC {result['auc']:.4f}" if result.get("auc") else ""
            report.tell(
                f"{name}, seed {seed}: {result['rows_per_cpu_second']:,.0f} rows a processor second, "
                f"{result['rows_per_second']:,.0f} a second, {result['peak_rss_mb']:,.0f} MB{quality}"
            )
    return found


def summary(results: Sequence[Result]) -> Result:
    """Medians of speed and memory, means of quality."""
    speeds = {n: median(r[n] for r in results) for n in ("rows_per_cpu_second", "rows_per_second", "peak_rss_mb")}
    quality = {n: fmean(r[n] for r in results) for n in ("auc", "logloss", "gauc") if results[0].get(n) is not None}
    kept = {n: results[0][n] for n in ("peer", "optimizer", "loader", "model") if n in results[0]}
    return {**kept, **speeds, **quality}


def ratio(a: Sequence[Result], b: Sequence[Result], name: str = "rows_per_cpu_second") -> float:
    """The median over turns of a's figure by b's."""
    return median(x[name] / y[name] for x, y in zip(a, b, strict=True))


def din(report: Report, seeds: int, quick: bool, scratch: Path) -> None:
    config = load_config(DIN)
    rows = export(prepare(config, installed()), scratch / "din.npz")
    epochs = 1 if quick else config.training.epochs
    common = {
        "path": str(rows),
        "features": DIN_FEATURES,
        "dim": config.embedding.dim,
        "hidden": [200, 80],
        "attention": [64, 16],
        "batch_size": BATCH,
        "epochs": epochs,
        "patience": config.training.early_stopping.patience,
    }
    found = turns(
        report,
        {
            "ours": lambda seed: ours(DIN, {"training.epochs": epochs}, seed),
            "fuxictr": lambda seed: environment.train("fuxictr_din", {**common, "seed": seed, "in_memory": False}),
            "deepctr": lambda seed: environment.train("deepctr_din", {**common, "seed": seed}),
            "fuxictr without its loader": lambda seed: environment.train(
                "fuxictr_din", {**common, "seed": seed, "in_memory": True}
            ),
        },
        seeds,
    )
    shown = {name: summary(results) for name, results in found.items()}
    fastest = max(("fuxictr", "deepctr"), key=lambda name: shown[name]["rows_per_cpu_second"])
    faster = ratio(found["ours"], found[fastest])
    no_lower = shown["ours"]["auc"] >= shown[fastest]["auc"]
    report.line(
        "din, ml-100k",
        ours={**shown["ours"], "optimizer": "fused row-wise Adagrad, Adam for the network"},
        peer={name: shown[name] for name in shown if name != "ours"},
        ratio=faster,
        target=f">= 2.5 x {fastest} in rows a processor second, at no lower mean AUC",
        ok=faster >= 2.5 and no_lower,
        ratio_wall=ratio(found["ours"], found[fastest], "rows_per_second"),
        ratio_without_its_loader=ratio(found["ours"], found["fuxictr without its loader"]),
        seeds=seeds,
    )


def large(report: Report, seeds: int, quick: bool, scratch: Path) -> None:
    sizes = [s // 20 for s in SIZES] if quick else SIZES
    data = make(scratch, rows=20_000 if quick else 60_000, sizes=sizes)
    prepare(load_config(data.config), installed())  # cached: the runs read what is prepared, as the others do
    common = {"path": str(data.arrays), "sizes": sizes, "dim": DIM, "hidden": HIDDEN, "batch_size": BATCH}
    bare = [sys.executable, str(HERE / "bare" / "tables.py")]
    peer_rows = BATCH * (2 if quick else 8)  # a step of theirs takes seconds
    found = turns(
        report,
        {
            "ours": lambda seed: ours(data.config, {}, seed),
            "bare": lambda seed: environment.last_object(bare, {**common, "seed": seed}),
            "bare, keeps memory": lambda seed: environment.last_object(bare, {**common, "seed": seed}, **KEPT),
            "deepctr": lambda seed: environment.train("deepctr_deepfm", {**common, "rows": peer_rows, "seed": seed}),
            "fuxictr": lambda seed: environment.train("fuxictr_deepfm", {**common, "rows": peer_rows, "seed": seed}),
        },
        seeds,
    )
    shown = {name: summary(results) for name, results in found.items()}
    peers = ("deepctr", "fuxictr")
    fastest = max(peers, key=lambda name: shown[name]["rows_per_cpu_second"])
    leanest = min(peers, key=lambda name: shown[name]["peak_rss_mb"])
    mine = {**shown["ours"], "optimizer": "fused row-wise Adagrad, Adam for the network"}
    what = f"DeepFM, 26 features of {min(sizes):,}-{max(sizes):,} ids, width {DIM}"
    faster = ratio(found["ours"], found[fastest])
    report.line(
        "26 large tables, beside dense Adam",
        ours=mine,
        peer={name: shown[name] for name in peers},
        ratio=faster,
        target=f">= 60 x {fastest} ({what})",
        ok=faster >= 60,
        ratio_wall=ratio(found["ours"], found[fastest], "rows_per_second"),
        seeds=seeds,
    )
    best = max(("bare", "bare, keeps memory"), key=lambda name: shown[name]["rows_per_cpu_second"])
    near = ratio(found["ours"], found[best])
    report.line(
        "26 large tables, beside a bare TorchRec loop",
        ours=mine,
        peer={name: shown[name] for name in shown if name.startswith("bare")},
        ratio=near,
        target=f">= .95 x the faster of both ({what}; the same network and optimizers, on TorchRec without the engine)",
        ok=near >= 0.95,
        ratio_wall=ratio(found["ours"], found[best], "rows_per_second"),
        seeds=seeds,
    )
    memory = ratio(found["ours"], found[leanest], "peak_rss_mb")
    report.line(
        "26 large tables, memory",
        ours=shown["ours"]["peak_rss_mb"],
        peer={name: results["peak_rss_mb"] for name, results in shown.items() if name != "ours"},
        ratio=memory,
        target=f"peak resident memory <= 1/3 of {leanest}'s",
        ok=memory <= 1 / 3,
        tables_mb=sum(sizes) * DIM * 4 / 2**20,
    )
    limit(report, shown["ours"]["rows_per_cpu_second"])


def limit(report: Report, rows_per_second: float) -> None:
    """How far the loop is from the speed at which memory can be moved."""
    gather, copy = gather_bytes_per_second(), copy_bytes_per_second()
    # forward reads a row's vectors; backward reads and writes them and their accumulated squares
    moved = len(SIZES) * (3 * DIM * 4 + 2 * 4)
    report.line(
        "26 large tables, beside the memory's bandwidth",
        ours={"table_bytes_moved_a_second": rows_per_second * moved, "table_bytes_a_row": moved},
        peer={"random_gather_bytes_a_second": gather, "copy_bytes_a_second": copy},
        ratio=rows_per_second * moved / gather,
        share_of_copy=rows_per_second * moved / copy,
    )


def main(argv: Sequence[str] | None = None) -> int:
    part = {"--only": {"choices": ["din", "tables"], "default": None, "help": "one of the two comparisons"}}
    options = arguments(__doc__ or "", argv, seeds=3, extra=part)
    report = Report("training_speed", quick=options.quick)
    why = environment.missing()
    if why:
        report.skip("all", why)
        return report.end()
    with tempfile.TemporaryDirectory() as scratch:
        if options.only != "tables":
            din(report, options.seeds, options.quick, Path(scratch))
        if options.only != "din":
            large(report, options.seeds, options.quick, Path(scratch))
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
