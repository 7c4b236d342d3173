"""One training run through the engine's doors: load a configuration, prepare the data, train."""

from __future__ import annotations

import logging
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


@dataclass
class Measured:
    """One trained model with the figures that `plexrank train` prints, and the processor time that it took."""

    run: Run
    cpu_seconds: float

    @property
    def figures(self) -> dict[str, Any]:
        """`logloss` is of the calibrated probabilities, `raw_logloss` of the logits as they are."""
        return self.run.figures

    @property
    def rows_per_cpu_second(self) -> float:
        """Rows trained a second of processor time; that of validation, checkpoints and the test counts too."""
        return float(self.figures["rows"]["train"] * self.figures["epochs"] / self.cpu_seconds)

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
        started = time.process_time()
        done = train_run(loaded, prepared, Path(scratch), plugins=plugins)
        seconds = time.process_time() - started
    assert done is not None
    return Measured(done, seconds)


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
