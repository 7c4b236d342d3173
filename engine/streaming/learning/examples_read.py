"""Joined examples that another learner wrote: read, known again, kept until they are trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import torch

from engine.batch import Batch
from engine.bundle import Bundle
from engine.config import Config
from engine.data.encoder import FeatureEncoder, Values
from engine.data.encoding import Encoded
from engine.errors import EventError, SchemaError
from engine.events import Reason
from engine.hashing import mix
from engine.streaming.events.dead import Dead, DeadLetters
from engine.streaming.join.dedupe import SeenEvents
from engine.streaming.join.emitted import Emitted
from engine.streaming.join.examples import JoinedExamples, decode_examples
from engine.streaming.join.feature_rows import FeatureRows, longer
from engine.streaming.join.ready import ReadyExamples
from engine.streaming.learning.fetch import Chunk

log = logging.getLogger("plexrank.learning")


class ExamplesRead:
    """The stream `examples` in place of raw events: nothing is joined, and the items are the bundle's.

    A learner that came back from a crash may have written examples twice; they are known again by request, item, kind
    and labels. It looks to the learner as `EventsJoined` does.
    """

    OUTCOMES = ("examples", "duplicates", "dead")
    items: Mapping[str, Mapping[str, object]] = {}

    def __init__(self, config: Config, bundle: Bundle, dead: DeadLetters, *, stopped: Callable[[], bool]) -> None:
        self.encoder, self.catalogue = bundle.encoder, bundle.catalogue
        self.tasks = bundle.schema.tasks
        self.changed_rows: list[np.ndarray] = []
        self.ready = ReadyExamples(len(self.tasks))
        self.pending = _Kept(bundle.encoder)
        self.counts: Counter[str] = Counter()
        self.newest = self.watermark = float("nan")
        self._seen = SeenEvents(config.learning.join.remembered)
        self._dead, self._stopped = dead, stopped

    def take(self, chunk: Chunk, clock: float) -> None:
        """Everything that a chunk holds. A record that cannot be read is a dead letter."""
        for record in chunk.records:
            if not record.value:
                continue
            try:
                self._add(decode_examples(self.encoder, [record.value]))
            except SchemaError:
                raise  # of another model: all of them are
            except EventError as error:
                self.counts["events"] += 1
                self._bury(Dead.of(record, Reason.ARROW, str(error)))

    def _add(self, joined: JoinedExamples) -> None:
        count, batch = len(joined), joined.batch
        labels = np.stack([batch.labels[task].numpy() for task in self.tasks], axis=1)
        item = np.zeros(count, np.int64) if batch.item_key is None else batch.item_key.numpy()
        new = self._seen.new(_names(joined, labels, item)) if batch.item_key is not None else np.ones(count, bool)
        slots = self.pending.put(batch)
        self.counts["events"] += count
        self.counts["examples"] += int(new.sum())
        self.counts["duplicates"] += count - int(new.sum())
        if count:
            self.newest = float(np.fmax(self.newest, joined.seconds.max()))
        weight = np.ones(count, np.float32) if batch.weight is None else batch.weight.numpy()
        self.ready.push(
            Emitted(
                slots[new],
                joined.request[new],
                item[new],
                labels[new],
                weight[new],
                joined.rate[new],
                joined.seconds[new],
                joined.kind[new],
                slots,
                np.empty(0, np.int64),
            )
        )

    def _bury(self, letter: Dead) -> None:
        self.counts["dead"] += 1
        self._dead.bury([letter], self._stopped)

    def advance(self, clock: float) -> None:
        """No window ends here."""

    def assign(self, partitions: Sequence[int], clock: float) -> None:
        """Nothing is waited for."""

    def turn_to(self, bundle: Bundle) -> None:
        """Goes on over another bundle's items; it reads features as the one before."""
        self.catalogue = bundle.catalogue

    def join_counts(self) -> dict[str, int]:
        return {}

    def open(self) -> dict[str, int]:
        return {}

    def state(self) -> dict[str, np.ndarray]:
        parts = {"seen": self._seen.state(), "ready": self.ready.state(), "pending": self.pending.state()}
        found = {f"{part}/{name}": value for part, its in parts.items() for name, value in its.items()}
        found["newest"] = np.array([self.newest])
        return {**found, "counts": np.frombuffer(msgspec.json.encode(self.counts), np.uint8)}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        parts = {p: {n.removeprefix(p): v for n, v in state.items() if n.startswith(p)} for p in _PARTS}
        self._seen.load(parts["seen/"])
        self.ready.load(parts["ready/"])
        self.pending.load(parts["pending/"])
        self.newest = float(state["newest"][0])
        self.counts = Counter(msgspec.json.decode(state["counts"].tobytes()))


_PARTS = ("seen/", "ready/", "pending/")


def _names(joined: JoinedExamples, labels: np.ndarray, item: np.ndarray) -> np.ndarray:
    """int64 [n]: what tells one example from another."""
    said = np.where(np.isnan(labels), 2, labels > 0.5).astype(np.int64)
    tasks, kind = labels.shape[1], joined.kind.astype(np.int64)
    outcome = kind % 3 + 3 * (said @ (3 ** np.arange(tasks, dtype=np.int64))) + 3 ** (tasks + 1) * (kind // 3)
    inner = mix(torch.from_numpy(item), 0) ^ torch.from_numpy(outcome)
    return mix(torch.from_numpy(np.ascontiguousarray(joined.request)) ^ mix(inner, 1), 2).numpy()


class _Kept:
    """Encoded examples by slot."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self._encoder = encoder
        self._rows = FeatureRows(encoder.schema.features)
        self._keys = np.zeros((16, 3), np.int64)  # user, item, time

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, batch: Batch) -> np.ndarray:
        """All rows of a batch -> their slots int64 [n]."""
        schema = self._encoder.schema
        columns: dict[str, Encoded] = {}
        for name, jagged in batch.jagged().items():
            lengths = jagged.lengths().numpy()
            offsets = np.concatenate([[0], np.cumsum(lengths)]) if schema[name].is_jagged else None
            columns[name] = Encoded(jagged.values().numpy(), offsets)
        for dense, from_request in ((batch.dense_user, True), (batch.dense_item, False)):
            names = [f.name for f in schema.dense if f.from_request is from_request]
            columns |= {name: Encoded(dense[:, j].numpy()) for j, name in enumerate(names)}
        slots = self._rows.put(columns, batch.targets)
        self._keys = longer(self._keys, self._rows.top)
        for j, key in enumerate((batch.user_key, batch.item_key, batch.time)):
            if key is not None:
                self._keys[slots, j] = key.numpy()
        return slots

    def take(self, slots: np.ndarray) -> Batch:
        """The batch of these slots, without labels."""
        ids: dict[str, Values] = {}
        numbers: dict[str, np.ndarray] = {}
        self._rows.take(slots, ids, numbers)
        schema, size = self._encoder.schema, len(slots)
        batch = self._encoder.assemble(ids, numbers, size, size)
        batch.user_of_target = torch.arange(size)
        user, item, moment = (torch.from_numpy(self._keys[slots, j]) for j in range(3))
        batch.user_key = user if schema.user else None
        batch.item_key = item if schema.item else None
        batch.time = moment if schema.time else None
        return batch

    def release(self, slots: np.ndarray) -> None:
        if len(slots):
            self._rows.free(slots)

    def state(self) -> dict[str, np.ndarray]:
        return {"keys": self._keys[self._rows.used()], **self._rows.state("rows")}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        self._rows.load("rows", state)
        self._keys = longer(self._keys, self._rows.top)
        self._keys[self._rows.used()] = state["keys"]
