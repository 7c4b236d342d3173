"""Items that come or change while serving: from item events into catalogue, retriever and scorer, aside of requests.

Events wait for a moment and enter together: a catalogue that has grown by them takes the place of the one before, with
sources and rerankers over it, the scorer gets the items' vectors, and then one pointer is set. A request that began
before ends with what it began with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.components import Scorer
from engine.errors import BundleError, EventError, SchemaError
from engine.events import Event, ItemData
from engine.hashing import canonical
from engine.item_file import ItemFile, Said
from engine.served import ItemsRefused, Served
from engine.streaming.deltas.delta import Delta, ItemVectors

log = logging.getLogger("plexrank.items")

MOST_ITEMS = 1_000_000
"""Items that events may add or change."""
MOST_VECTORS = 10_000
"""Vectors that wait for their items."""
_TOGETHER = 10_000
"""Items that enter together."""


class Holder(Protocol):
    """What requests read: the pipeline."""

    served: Served

    def swap(self, served: Served) -> None: ...


class LiveItems:
    """Safe from many threads. `add` is quick: what it says is served a moment later, see `flush`."""

    def __init__(
        self,
        holder: Holder,
        scorer: Scorer,
        *,
        path: Path | None = None,
        interval: float = 0.1,
        most: int = MOST_ITEMS,
    ) -> None:
        """path: file that keeps what events said between starts; what it holds is served when this returns.

        interval: seconds between two changes of what is served; longer where a change takes longer.
        """
        self.holder, self.scorer, self.interval, self.most = holder, scorer, interval, most
        self.refused = 0
        self._file = None if path is None else ItemFile(path)
        self._said: dict[str, Said] = {} if self._file is None else self._file.read()
        self._left_out: set[str] = set()  # of those, what the bundle that serves cannot take
        self._waiting: dict[str, Said] = {}
        self._vectors: dict[str, np.ndarray] = {}  # of items that are not in the catalogue yet
        self._wake = threading.Condition()
        self._changing = threading.Lock()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None
        if self._said:
            self.swap(holder.served)

    # ------------------------------------------------------------------------------------------------ events
    def check(self, item: str, features: Mapping[str, Any]) -> dict[str, Any]:
        """The features that the catalogue can hold. EventError: a value that cannot be read, or one item too many."""
        schema, catalogue = self.holder.served.schema, self.holder.served.catalogue
        of_item = schema.of_item()
        for feature in of_item:
            value = features.get(feature.name, features.get(feature.column))
            if feature.kind == "numeric":
                try:
                    float(value or 0)
                except (TypeError, ValueError, OverflowError):
                    raise EventError(f"data.features.{feature.name} is numeric, got {str(value)[:64]!r}") from None
        if item not in self._said and len(self._said) + len(self._waiting) >= self.most:
            raise EventError(f"{self.most} items were added or changed since the bundle was made: train a new one")
        known = {*catalogue.attributes, *(f.name for f in of_item), *(f.column for f in of_item)} - {schema.item}
        return {name: value for name, value in features.items() if name in known}

    def add(self, item: str | int, features: Mapping[str, Any], seconds: float) -> None:
        """What is known of an item now: values replace, None removes. seconds: since 1970. EventError as `check`."""
        name = canonical(item)
        kept = self.check(name, features)
        with self._wake:
            if self._closed:
                return
            _merge(self._waiting, Said(name, kept, float(seconds)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="plexrank-items", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def add_events(self, events: Iterable[Event]) -> None:
        """The item events among these, in their order; those that cannot be read are counted and named in the log."""
        for event in events:
            if isinstance(event.data, ItemData):
                try:
                    self.add(event.data.item, event.data.features, event.seconds)
                except EventError as error:
                    self._refuse([canonical(event.data.item)], error)

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until what was added is served -> whether that came in time."""
        until = time.monotonic() + timeout
        with self._wake:
            while self._waiting or self._busy:
                left = until - time.monotonic()
                if left <= 0 or self._closed:
                    return False
                self._wake.wait(min(left, 1.0))
        return True

    def keep(self, timeout: float) -> bool:
        """What was added is served, and on the disk for the next start -> whether that came in time. OSError."""
        if not self.flush(timeout):
            return False
        with self._changing:
            if self._file is not None:
                self._file.sync()
        return True

    # ------------------------------------------------------------------------------------- bundles and deltas
    def swap(self, served: Served) -> None:
        """In place of the holder's own `swap`, after the scorer has loaded the same bundle: what events said of items
        holds on, over the new one. An item that the new bundle cannot read is left out of it, by name in the log; it is
        tried again with the next one."""
        with self._changing:
            self._vectors = {}  # of another encoder
            entered = self._enter(served, [*self._said.values()], anew=True)
            self._left_out = self._said.keys() - {one.item for one in entered}

    def take_encoder(self, part: Delta) -> None:
        """A delta's part for the retrieval encoder, with its vectors: users' and items' vectors change together.
        Vectors of items that are not here yet wait for them.

        BundleError where it does not fit the bundle's encoder: nothing was changed. One of another bundle, which is on
        its way in or out, is left out.
        """
        with self._changing:
            served = self.holder.served
            if part.base == served.bundle.version:
                self._follow(served.with_encoder(part), part.vectors)

    def _follow(self, served: Served, vectors: ItemVectors | None) -> None:
        if served is not self.holder.served:
            self.holder.swap(served)
        if vectors is not None:
            for n in np.flatnonzero(served.catalogue.rows(vectors.ids) < 0).tolist():
                self._vectors.pop(vectors.ids[n], None)
                self._vectors[vectors.ids[n]] = vectors.values[n]
            for item in list(self._vectors)[: max(0, len(self._vectors) - MOST_VECTORS)]:
                del self._vectors[item]

    def status(self) -> dict[str, Any]:
        """added, changed: items beside the bundle's, and of its own; left_out: items that the bundle cannot read;
        waiting, refused: events; newest: seconds since 1970 of the newest that was taken."""
        served, said = self.holder.served, list(self._said.values())
        added = len(served.catalogue) - len(served.bundle.catalogue)
        return {
            "added": added,
            "changed": len(said) - added - len(self._left_out),
            "left_out": len(self._left_out),
            "waiting": len(self._waiting),
            "vectors_waiting": len(self._vectors),
            "refused": self.refused,
            "newest": max((one.seconds for one in said), default=None),
        }

    def close(self) -> None:
        """What waits enters; then the thread ends."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    # --------------------------------------------------------------------------------------------------- work
    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                if not self._waiting:
                    return
                first = list(self._waiting)[:_TOGETHER]
                batch = [self._waiting.pop(item) for item in first]
                self._busy = True
            begin = time.monotonic()
            try:
                with self._changing:
                    self._take(batch)
            except Exception as error:
                log.error("%d items are not served yet: %s: %s", len(batch), type(error).__name__, error)
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                if not self._closed:
                    self._wake.wait_for(lambda: self._closed, max(self.interval, time.monotonic() - begin))

    def _take(self, batch: list[Said]) -> None:
        before = {one.item: self._said.get(one.item) for one in batch}
        for said in batch:
            _merge(self._said, said)
        batch = [self._said[one.item] if one.item in self._left_out else one for one in batch]
        entered = self._enter(self.holder.served, batch)
        here = {one.item for one in entered}
        self._left_out -= here
        for item in before.keys() - here:
            self._said.pop(item)
            if (old := before[item]) is not None:
                self._said[item] = old
        if self._file is not None:
            self._file.write([self._said[one.item] for one in entered], self._said)

    def _enter(self, served: Served, batch: list[Said], *, anew: bool = False) -> list[Said]:
        """Scorer first, then what proposes items to it -> those that are served now."""
        grown, entered = self._grown(served, batch)
        if entered:
            rows = np.unique(grown.catalogue.rows([one.item for one in entered]))
            self.scorer.items_changed(grown.bundle.version, grown.catalogue, None if anew else rows)
        here = [one.item for one in entered if one.item in self._vectors]
        if here:
            values = np.stack([self._vectors.pop(item) for item in here])
            try:
                grown = grown.with_vectors(ItemVectors(here, values))
            except BundleError as error:
                log.warning("vectors of %d new items are left out: %s", len(here), error)
        if grown is not self.holder.served:
            self.holder.swap(grown)
        return entered

    def _grown(self, served: Served, batch: list[Said]) -> tuple[Served, list[Said]]:
        """With all of a batch that can be read."""
        if not batch:
            return served, []
        try:
            grown = served.with_items(
                [one.item for one in batch], [one.features for one in batch], [one.seconds for one in batch]
            )
            return grown, batch
        except ItemsRefused as error:
            refused = set(error.items)
            self._refuse(error.items, error)
            return self._grown(served, [one for one in batch if one.item not in refused])
        except SchemaError as error:
            if len(batch) == 1:
                self._refuse([batch[0].item], error)
                return served, []
        half = len(batch) // 2
        served, first = self._grown(served, batch[:half])
        served, second = self._grown(served, batch[half:])
        return served, first + second

    def _refuse(self, items: Sequence[str], error: EventError | SchemaError) -> None:
        self.refused += len(items)
        what = f"item '{items[0]}' is" if len(items) == 1 else f"{len(items):,} items are"
        log.warning("%s left as before: %s", what, error)


def _merge(into: dict[str, Said], said: Said) -> None:
    """Later values over earlier ones."""
    before = into.get(said.item)
    if before is None:
        into[said.item] = said
    else:
        into[said.item] = Said(said.item, {**before.features, **said.features}, max(before.seconds, said.seconds))
