"""One training run through the engine's doors: load a configuration, prepare the data, train."""

from __future__ import annotations

import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

warnings.filterwarnings("ignore")
logging.getLogger("torchrec").setLevel(logging.ERROR)

from engine.batch import Batch  # noqa: E402
from engine.data.prepare import prepare  # noqa: E402
from engine.loading import load_config  # noqa: E402
from engine.plugins import Plugins, installed  # noqa: E402
from engine.train_command import Run, train_run  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


class Pace:
    """A progress callback that clocks training steps: validation, checkpoints and what is done once are left out."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[float, float, float]]] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        if found := re.match(r"training\W+epoch (\d+)", stage):
            self._marks.setdefault(found[1], []).append((fraction, time.perf_counter(), time.process_time()))

    def seconds(self) -> tuple[float, float, float]:
        """(share of the whole training that was clocked, its wall and its processor seconds)."""
        ends = [(marks[0], marks[-1]) for marks in self._marks.values()]
        share, wall, cpu = (sum(last[i] - first[i] for first, last in ends) for i in range(3))
        return share, wall, cpu


@dataclass
class Measured:
    """One trained model with the figures that `plexrank train` prints.

    speed: rows_per_second and rows_per_cpu_second of the training steps alone.
    """

    run: Run
    speed: dict[str, float]

    @property
    def figures(self) -> dict[str, Any]:
        """`logloss` is of the calibrated probabilities, `raw_logloss` of the logits as they are; `embedding_bytes` are
        those of the tables that are served, without vocabularies."""
        served = sum(t.nbytes for t in self.run.model.embedding.state_dict().values())
        return {**self.run.figures, "embedding_bytes": served}

    def batches(self, split: str) -> Iterator[Batch]:
        """The rows of a split, in the order of time."""
        return self.run.prepared.batches(split, 8192)


def run(config: Path, overrides: Mapping[str, Any], seed: int, plugins: Plugins | None = None) -> Measured:
    """Trains one ranking model (no retrieval) on one thread; data are prepared once and cached.

    Overrides are those of `load_config`: `{"embedding.name": "unified"}`.
    """
    plugins = plugins or installed()
    loaded = load_config(config, {"training.threads": 1, **overrides, "seed": seed}, plugins)
    loaded = loaded.model_copy(update={"retrieval": None})
    prepared = prepare(loaded, plugins)
    with tempfile.TemporaryDirectory() as scratch:
        pace = Pace()
        done = train_run(loaded, prepared, Path(scratch), plugins=plugins, progress=pace)
    assert done is not None
    share, wall, cpu = pace.seconds()
    rows = share * prepared.steps("train", loaded.training.batch_size) * loaded.training.batch_size
    rows *= loaded.training.epochs
    speed = {"rows_per_second": rows / wall, "rows_per_cpu_second": rows / cpu} if cpu else {}
    return Measured(done, speed)


def mean_of(runs: Sequence[Measured], *names: str) -> dict[str, float | None]:
    """Means over runs of named metrics; None where a run has none."""
    found: dict[str, float | None] = {}
    for name in names:
        values = [r.figures.get(name) for r in runs]
        found[name] = None if any(v is None for v in values) else fmean(float(v) for v in values if v is not None)
    return found


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0
