"""The one process that renews live memory: deltas into mapped tables, items' vectors and dense parts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Self

from torch import Tensor

from engine.bundle import Bundle
from engine.errors import BundleError, DeltaGap, PlexrankError
from engine.files import Held, hold
from engine.inference.live import ITEM_VECTORS_MB
from engine.inference.live_files import DensePart, Generation, copy, naming
from engine.inference.live_making import Made, Source, bundle_source, enter, generation_path, make, remove_others
from engine.inference.live_state import Record, StatePage
from engine.inference.live_view import LiveView, check, first_view
from engine.inference.quantised import Kind
from engine.item_side import ItemSide
from engine.plugins import Plugins, installed
from engine.streaming.deltas.apply import Chain, Step, check_fit, with_dense, write_rows
from engine.streaming.deltas.delta import Delta, TableRows
from engine.streaming.deltas.encoder_delta import apart
from engine.streaming.learning.recalibration import apart as without_calibration
from engine.training.calibration import Calibration

log = logging.getLogger("plexrank.inference")

_EMBEDDING = "embedding."


class LiveWriter:
    """Applies deltas to what every `LiveModel` of the folder scores with.

    Rows are written in place, the dense part into the file that is not in use; then the state page names the new
    version. A chain that is begun anew, and an embedding whose dense part changes, make a generation of their own: what
    a reader has does not change under it but for rows. One that was stopped while it wrote rows leaves them between two
    versions; the next one begins from the bundle again.
    """

    _page: StatePage
    _record: Record
    _generation: Generation
    _dense: DensePart
    _view: LiveView

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        plugins: Plugins | None = None,
        *,
        item_vectors_mb: int = ITEM_VECTORS_MB,
        tables: Kind = "float32",
        timeout: float = 600.0,
    ) -> None:
        """tables: how a generation that is made of the bundle holds its tables.

        PlexrankError naming the process that writes there already, or the folder where it cannot be written to;
        BundleError where it is another bundle's."""
        self.folder, self.bundle = folder, bundle
        self._plugins, self._most_bytes = plugins if plugins is not None else installed(), item_vectors_mb << 20
        self._kind: Kind = tables
        self._changing = threading.Lock()
        with naming(folder, "cannot be opened"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        try:
            enter(folder, bundle, self._plugins, self._most_bytes, timeout, tables)
            with naming(folder, "cannot be mapped"):
                self._take_up()
        except BaseException:
            self._lock.close()
            raise

    @property
    def version(self) -> str:
        """What the folder's readers score with, or will in a moment."""
        return self._view.version

    @property
    def in_place(self) -> bool:
        """False where the folder was removed: what is written would reach nobody, and `apply` refuses it."""
        return self._page.in_place

    @property
    def chain(self) -> Chain:
        return Chain(self.bundle.name, self.bundle.version, self._record.epoch, self._record.sequence)

    # ---------------------------------------------------------------------------------------------- changes
    def apply(self, delta: Delta) -> None:
        """As `engine.components.Scorer.apply`: DeltaGap where it does not follow, BundleError where it does not fit or
        does not score, and nothing was changed. PlexrankError naming the folder where the disk is full."""
        delta, _ = apart(delta)
        with self._changing, naming(self.folder, f"delta {delta.version} cannot be written"):
            self._check_held()
            if self._page.dirty:
                self._begin_anew()
            step = self.chain.step(delta)
            if step is Step.KNOWN:
                return
            delta, newer = without_calibration(delta, self.bundle.schema.tasks)
            check_fit(self._view.model, delta)
            if step is Step.ANEW:
                self._make(self._from_bundle(delta), delta, newer)
            elif any(name.startswith(_EMBEDDING) for name in delta.dense):
                model = with_dense(self._view.model, delta.dense)
                check(replace(self._view, model=model, items=None), f"delta {delta.version}")
                self._page.dirty = bool(delta.tables)  # readers of the generation before share these
                self._make(Source(self._generation, self._dense), delta, newer)
            else:
                self._in_place(delta, newer)
            self._page.beat()

    def begin_anew(self) -> None:
        """The bundle's own weights again, without any delta: what a follower wants that could not close a gap."""
        with self._changing, naming(self.folder, "a generation cannot be made"):
            self._check_held()
            self._begin_anew()

    def beat(self) -> None:
        """Says in the state page that the writer is alive."""
        self._page.beat()

    def close(self) -> None:
        """The next writer may come. What was written stays."""
        with self._changing:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- in place
    def _in_place(self, delta: Delta, newer: Mapping[str, Calibration]) -> None:
        view, before, chain = self._view, self._record, self.chain.after(delta)
        model, items, calibration = view.model, view.items, {**view.calibration, **newer}
        dense = DensePart({**self._dense.state, **delta.dense}, calibration)
        record = replace(before, number=before.number + 1, epoch=chain.epoch, sequence=chain.sequence)
        if delta.dense:
            model = with_dense(model, delta.dense)
            items = None if items is None else items.with_model(model)
        view = replace(view, model=model, items=items, calibration=calibration, version=chain.version)
        if delta.dense or newer:
            check(view, f"delta {delta.version}")
            data, number = dense.encoded(), before.dense + 1
            record = Record.of(
                record.number, before.generation, data, dense=number, epoch=chain.epoch, sequence=chain.sequence
            )
            self._generation.write_dense(record.slot, data)
        if delta.tables:
            if items is not None:
                items.prepare()  # not while readers meet rows that no version names yet
            self._page.dirty = True
            write_rows(model, delta.tables, pause=False)
            view = view if items is None else replace(view, items=self._renewed(items, delta.tables))
        self._page.write(record)
        self._page.dirty = False
        self._view, self._record, self._dense = view, record, dense

    def _renewed(self, items: ItemSide, changed: Mapping[str, TableRows]) -> ItemSide:
        """The items' vectors, in the memory that is shared."""
        held, renewed = items.held, items.renewed(changed, pause=False)
        if renewed.held.vectors is held.vectors:
            return renewed
        copy(renewed.held.vectors, held.vectors)  # of an embedding that is not read by rows, all are made anew
        return items.read_again(renewed.model)

    # ---------------------------------------------------------------------------------------------- generations
    def _make(self, source: Source, delta: Delta, newer: Mapping[str, Calibration]) -> None:
        """A generation with this delta in it, in place of the one there is."""
        chain, before = self.chain.after(delta), self._record
        state: dict[str, Tensor] = {**source.dense.state, **delta.dense}
        dense = DensePart(state, {**source.dense.calibration, **newer})
        made = make(
            self.folder,
            before.generation + 1,
            self.bundle,
            self._plugins,
            self._most_bytes,
            replace(source, dense=dense),
            delta.tables,
            chain.version,
        )
        self._go_to(made, dense, chain)

    def _begin_anew(self) -> None:
        source = bundle_source(self.bundle, self._plugins, self._kind)
        chain = Chain(self.bundle.name, self.bundle.version)
        number = self._record.generation + 1
        made = make(self.folder, number, self.bundle, self._plugins, self._most_bytes, source, {}, chain.version)
        self._go_to(made, source.dense, chain)

    def _go_to(self, made: Made, dense: DensePart, chain: Chain) -> None:
        before = self._record
        record = Record.of(
            before.number + 1, before.generation + 1, made.dense, epoch=chain.epoch, sequence=chain.sequence
        )
        self._page.write(record)
        self._page.dirty = False
        self._page.beat()
        self._generation, self._view, self._record, self._dense = made.generation, made.view, record, dense
        remove_others(self.folder, record.generation)

    def _from_bundle(self, delta: Delta) -> Source:
        """What the bundle has on the disk. DeltaGap where it is no longer in its place."""
        try:
            opened = Bundle.open(self.bundle.path, verify=False)
            if opened.manifest.digest == self.bundle.manifest.digest:
                return bundle_source(self.bundle, self._plugins, self._kind)
        except BundleError as error:
            raise DeltaGap(
                f"delta {delta.version} begins a chain anew, and its bundle cannot be read: {error}"
            ) from error
        raise DeltaGap(f"delta {delta.version}: {opened.path} now holds {opened.version}: load bundle {delta.base}")

    # ---------------------------------------------------------------------------------------------- helpers
    def _take_up(self) -> None:
        """Goes on where the writer before ended; from the bundle where that one was stopped while it wrote, or where
        its generation is damaged."""
        page = StatePage.open(self.folder, self.bundle, writable=True)
        if page is None:
            raise PlexrankError(f"{self.folder}: the live memory was removed while it was opened; try again")
        self._page, self._record = page, page.read()
        page.beat()
        remove_others(self.folder, self._record.generation)
        record = self._record
        try:
            self._generation = Generation.open(generation_path(self.folder, record.generation), writable=True)
        except PlexrankError as error:
            log.warning("begins anew: %s", error)
            self._begin_anew()
            return
        data = self._generation.read_dense(record.slot, record.dense_bytes, record.dense_crc)
        if page.dirty or data is None:
            self._begin_anew()
            return
        self._dense = DensePart.decoded(data)
        self._view = first_view(
            self.bundle, self._plugins, self._generation, self._dense, self.chain.version, self._most_bytes
        )

    def _check_held(self) -> None:
        if self._lock.closed:
            raise PlexrankError(f"{self.folder}: this writer is closed")
        if not self.in_place:
            raise PlexrankError(f"{self.folder}: the live memory was removed: start the writer again")


def _locked(folder: Path) -> IO[str]:
    """PlexrankError naming who has it."""
    try:
        return hold(folder / "writer.lock")
    except Held as held:
        raise PlexrankError(f"{folder}: {held.holder} writes there already; stop it first") from None
