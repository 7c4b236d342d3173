"""A model over memory that all processes of a machine share, and that one of them, `LiveWriter`, renews."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from engine.bundle import Bundle
from engine.errors import PlexrankError
from engine.inference.live_files import DensePart, Generation, naming
from engine.inference.live_making import enter, generation_path
from engine.inference.live_state import Record, StatePage
from engine.inference.live_view import LiveView, first_view
from engine.inference.quantised import Kind
from engine.item_side import ItemSide
from engine.model import RankingModel
from engine.plugins import Plugins, installed
from engine.streaming.deltas.apply import with_dense
from engine.streaming.deltas.delta import version_of
from engine.training.calibration import Calibration

log = logging.getLogger("plexrank.inference")

ITEM_VECTORS_MB = 256
"""Most memory for items' vectors, MiB."""
_TRIES = 20
_LOOK_SECONDS = 1.0
"""Between two looks whether the folder is still the one that is mapped."""
_RETRY_SECONDS = 0.5


Over = Callable[[RankingModel], RankingModel]


def _itself(model: RankingModel) -> RankingModel:
    return model


class LiveModel:
    """Reads live memory. `now` is what scores: take it once a request, all of it is of one moment.

    Another thread calls `refresh` every few milliseconds; requests take no lock and never wait for it.
    """

    def __init__(self, folder: Path, bundle: Bundle, plugins: Plugins, most_bytes: int, over: Over) -> None:
        """`open` gives one."""
        self.folder, self.bundle = folder, bundle
        self.trouble: str | None = None
        self._plugins, self._most_bytes, self._over = plugins, most_bytes, over
        self._turning = threading.Lock()
        self._look = self._again = 0.0
        self._raw = b""
        self._page = self._opened()
        self._generation: Generation | None = None
        self._record: Record | None = None
        self._dense: DensePart | None = None
        self._view: LiveView | None = None
        with naming(folder, "cannot be mapped"):
            self._turn()

    @classmethod
    def open(
        cls,
        folder: Path,
        bundle: Bundle,
        plugins: Plugins | None = None,
        *,
        item_vectors_mb: int = ITEM_VECTORS_MB,
        tables: Kind = "float32",
        over: Over = _itself,
        timeout: float = 600.0,
    ) -> LiveModel:
        """Maps what is there; where there is nothing, makes it from the bundle, or waits while another process does.

        item_vectors_mb: most memory for items' vectors where they are to be made; those that are there are used.
        tables: how the tables are held where they are to be made. over: a model -> one of the same parts that scores in
        its place; asked again for each new dense part.
        PlexrankError naming the folder where it cannot be written to or the disk is full; BundleError where it is
        another bundle's, or the bundle's weights are not what its manifest says.
        """
        found = plugins if plugins is not None else installed()
        enter(folder, bundle, found, item_vectors_mb << 20, timeout, tables)
        return cls(folder, bundle, found, item_vectors_mb << 20, over)

    # ---------------------------------------------------------------------------------------------- what scores
    @property
    def now(self) -> LiveView:
        view = self._view
        if view is None:
            raise PlexrankError(f"{self.folder}: closed")
        return view

    @property
    def model(self) -> RankingModel:
        return self.now.model

    @property
    def items(self) -> ItemSide | None:
        return self.now.items

    @property
    def calibration(self) -> Mapping[str, Calibration]:
        return self.now.calibration

    @property
    def version(self) -> str:
        return self.now.version

    # ---------------------------------------------------------------------------------------------- changes
    def refresh(self) -> bool:
        """Takes up what was written since -> whether `now` is another one: what was made of rows must be made again.

        Never raises: what goes wrong is in `trouble`, once in the log, and tried again; `now` stays as it is.
        """
        clock = time.monotonic()
        if clock < self._look and self._page.raw() == self._raw:
            return False
        if clock < self._again or not self._turning.acquire(blocking=False):
            return False
        try:
            if self._view is None:
                return False
            self._look = clock + _LOOK_SECONDS
            if not self._page.in_place:
                self._page, self._generation, self._record, self._raw = self._opened(), None, None, b""
            moved = self._page.raw() != self._raw and self._turn()
            self.trouble = None
            return moved
        except Exception as error:
            self._again = self._look = clock + _RETRY_SECONDS
            text = f"{type(error).__name__}: {error}"
            if text != self.trouble:
                log.warning("%s: %s scores on: %s", self.folder, self.version, text)
            self.trouble = text
            return False
        finally:
            self._turning.release()

    def close(self) -> None:
        """Lets go of the memory, as soon as nobody scores with it."""
        with self._turning:
            self._view = self._generation = self._dense = None

    def _opened(self) -> StatePage:
        with naming(self.folder, "cannot be read"):
            page = StatePage.open(self.folder, self.bundle)
        if page is None:
            raise PlexrankError(f"{self.folder}: the live memory was removed: start what serves it again")
        return page

    def _turn(self) -> bool:
        """Goes to the newest record; looks again where the writer was faster."""
        for _ in range(_TRIES):
            raw, record = self._page.raw(), self._page.read()
            if self._record is not None and record.number <= self._record.number:
                self._raw = raw
                return False
            try:
                view = self._seen(record)
            except FileNotFoundError:
                time.sleep(0.001)  # the writer went on to a newer generation
                continue
            if view is not None:
                self._view, self._record, self._raw = view, record, raw
                return True
        raise PlexrankError(f"{self.folder}: generation {record.generation} is not whole: remove the folder")

    def _seen(self, record: Record) -> LiveView | None:
        """What scores at a record; None where its dense part was written over meanwhile."""
        version = version_of(self.bundle.version, record.epoch, record.sequence)
        old, before, generation = self._view, self._record, self._generation
        if old is not None and generation is not None and before is not None:
            if (before.generation, before.dense) == (record.generation, record.dense):
                return _again(old, old.model, old.calibration, version)
            if before.generation == record.generation:
                dense = _dense_of(generation, record)
                if dense is None:
                    return None
                model, self._dense = self._with(old.model, dense), dense
                return _again(old, model, dense.calibration, version)
        generation = Generation.open(generation_path(self.folder, record.generation))
        dense = _dense_of(generation, record)
        if dense is None:
            return None
        view = first_view(self.bundle, self._plugins, generation, dense, version, self._most_bytes)
        view = _again(view, self._over(view.model), view.calibration, version)
        self._generation, self._dense = generation, dense
        return view

    def _with(self, model: RankingModel, dense: DensePart) -> RankingModel:
        """A second model with what is other in this dense part."""
        assert self._dense is not None
        held = self._dense.state
        changed = {name: tensor for name, tensor in dense.state.items() if not torch.equal(tensor, held[name])}
        return self._over(with_dense(model, changed)) if changed else model


def _again(view: LiveView, model: RankingModel, calibration: Mapping[str, Calibration], version: str) -> LiveView:
    items = None if view.items is None else view.items.read_again(model)
    return replace(view, model=model, items=items, calibration=calibration, version=version)


def _dense_of(generation: Generation, record: Record) -> DensePart | None:
    data = generation.read_dense(record.slot, record.dense_bytes, record.dense_crc)
    return None if data is None else DensePart.decoded(data)
