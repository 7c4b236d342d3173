"""A learner's and a server's side of one model, without a model: versions, a chain, a scorer that keeps rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.bundle import read_manifest
from engine.components import PluginOptions, Scorer
from engine.components.logs import EventLog
from engine.errors import BundleError, DeltaGap, PlexrankError
from engine.streaming.deltas.delta import Delta, TableRows, standing
from engine.streaming.deltas.follower import DeltaFollower
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.deltas.registry import ModelRegistry
from tests.streaming.memory_log import MemoryLog
from tests.streaming.small_bundles import A, B, C, write_small

DIM = 4


def a_delta(base: str, epoch: int, sequence: int, *, rows: int = 4, **changes) -> Delta:
    """Writes its sequence into `rows` rows, of which row 0 is in every delta and the others are its own."""
    own = np.concatenate([[0], np.arange(rows - 1) + 1 + 1000 * sequence]).astype(np.int64)
    fields = {
        "model": "films",
        "base": base,
        "epoch": epoch,
        "sequence": sequence,
        "created": time.time(),
        "newest": 1_700_000_000.0 + sequence,
        "tables": {"item": TableRows(own, np.full((rows, DIM), sequence, np.float32))},
        "positions": {0: 100 * sequence},
    }
    return Delta(**(fields | changes))


class RowScorer(Scorer):
    """Keeps rows in a dictionary: what a scorer's tables would hold after the deltas that it took."""

    name = "rows"

    def __init__(self) -> None:
        super().__init__(PluginOptions())
        self.at: str | None = None
        self.rows: dict[int, float] = {}
        self.loaded: list[str] = []
        self.taken: list[str] = []
        self.refuse: Callable[[Delta], None] | None = None

    @property
    def version(self) -> str:
        if self.at is None:
            raise PlexrankError("no bundle is loaded")
        return self.at

    def load(self, bundle: Path) -> None:
        self.at = read_manifest(bundle).version
        self.rows = {}
        self.loaded.append(self.at)

    def apply(self, delta: Delta) -> None:
        if self.refuse is not None:
            self.refuse(delta)
        where = standing(delta, self.version)
        if where == "gap":
            raise DeltaGap(f"{delta.version} does not follow {self.version}")
        if where == "next":
            table = delta.tables["item"]
            self.rows |= dict(zip(table.rows.tolist(), table.values[:, 0].tolist(), strict=True))
            self.at = delta.version
            self.taken.append(delta.version)

    def score(self, request):
        raise BundleError("not in this world")

    explain = score

    def health(self) -> None:
        """Always well."""


def rows_after(sequence: int, rows: int = 4) -> dict[int, float]:
    """What deltas 1..sequence leave in the rows, written down without them."""
    own = {n + 1000 * s: float(s) for s in range(1, sequence + 1) for n in range(1, rows)}
    return ({0: float(sequence)} if sequence else {}) | own


class World:
    """Three bundles, a registry, the streams, and followers that are stopped at the end."""

    def __init__(self, folder: Path, deltas: EventLog | None = None, models: EventLog | None = None) -> None:
        self.folder = folder
        log = MemoryLog(stream="events")
        self.deltas = deltas or log.sibling("deltas", partitions=1)
        self.models = models or log.sibling("models", partitions=1, compact=True)
        self.registry = ModelRegistry(folder / "models")
        self.bundles = {v: write_small(folder / f"made-{v[0]}", v, weight=n) for n, v in enumerate((A, B, C))}
        self.followers: list[DeltaFollower] = []
        self.publishers: list[DeltaPublisher] = []

    def publisher(self, **options) -> DeltaPublisher:
        publisher = DeltaPublisher(self.deltas, self.models, ModelRegistry(self.registry.root), **options)
        self.publishers.append(publisher)
        return publisher

    def follower(self, scorer: RowScorer | None = None, **options) -> tuple[DeltaFollower, RowScorer]:
        scorer = scorer or RowScorer()
        follower = DeltaFollower(self.deltas, self.models, ModelRegistry(self.registry.root), scorer, **options)
        self.followers.append(follower)
        return follower.start(), scorer

    def close(self) -> None:
        for follower in self.followers:
            follower.stop()
        for publisher in self.publishers:
            publisher.close()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Fails by name where a condition does not come to hold."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.005)
