"""From records of the log to examples: decode, know again, bury what is dead, join."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa

from engine.bundle import Bundle
from engine.catalogue import ArrowCatalogue
from engine.components import LogRecord
from engine.config import Config
from engine.errors import EventError, SchemaError
from engine.events import Event, EventLimits, ItemData, Reason, event_name
from engine.hashing import canonical, fingerprints
from engine.streaming.events.arrow_events import decode_batch, is_batch, row_of
from engine.streaming.events.dead import Dead, DeadLetters
from engine.streaming.events.decode import Interactions, Rankings, decode_records
from engine.streaming.join.dedupe import SeenEvents
from engine.streaming.join.emitted import Emitted
from engine.streaming.join.join import Joiner
from engine.streaming.join.pending import PendingExamples
from engine.streaming.join.ready import ReadyExamples
from engine.streaming.join.watermark import Watermarks
from engine.streaming.learning.fetch import Chunk

log = logging.getLogger("plexrank.learning")

JUDGED = 1000
"""Newest events of which a share of dead ones stops the learner."""

_FOREIGN = "its ranking did not show this item"


class EventsJoined:
    """The stream of raw events as examples in `ready`; all of its state is in `state`.

    An item that the catalogue does not hold is no reason to refuse anything: its id is trained by its hash. Dead are
    events that cannot be read, rankings whose features cannot be encoded, and interactions with an item that their
    ranking did not show.
    """

    OUTCOMES = ("rankings", "interactions", "items", "users", "duplicates", "dead")

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        dead: DeadLetters,
        *,
        stopped: Callable[[], bool],
        presumed: Mapping[str, float] | None = None,
    ) -> None:
        """config: of the learner. stopped: whether to give up waiting for a log that does not answer. presumed: as
        `Joiner` takes it."""
        learning, limits = config.learning, config.serving.limits
        self.learning, self.tasks = learning, bundle.schema.tasks
        self.limits = EventLimits(limits.id_bytes, limits.depth)
        self.encoder = bundle.encoder
        self.catalogue: ArrowCatalogue = bundle.catalogue
        self.changed_rows: list[np.ndarray] = []  # catalogue rows that item events changed, until somebody takes them
        self.ready = ReadyExamples(len(self.tasks))
        self.counts: Counter[str] = Counter()
        self.newest, self.watermark = float("nan"), float("-inf")
        self._bundle_catalogue = bundle.catalogue
        self._items: dict[str, dict[str, object]] = {}
        self._dead, self._stopped = dead, stopped
        self._seen = SeenEvents(learning.join.remembered)
        types = interaction_types(config, self.tasks)
        self.joiner = Joiner(self.tasks, types, learning.join, config.seed, presumed)
        self.pending = PendingExamples(self.encoder, self.catalogue)
        self.watermarks = Watermarks(learning.join.lateness_seconds, learning.join.idle_seconds)
        self._judged: deque[tuple[int, int]] = deque()  # events and dead ones of each newest chunk

    # ------------------------------------------------------------------------------------------------ events
    def take(self, chunk: Chunk, clock: float) -> None:
        """Everything that follows from a chunk. clock: this machine's time for idle partitions, in seconds.

        EventError where too large a share of the newest events was dead: something is wrong with who sends them.
        """
        records = chunk.records
        decoded = decode_records(records, self.limits, time.time(), self.learning.join.future_seconds)
        dead = list(decoded.dead)
        counts = self.counts
        counts["events"] += decoded.n
        counts["items"] += len(decoded.items)
        counts["users"] += len(decoded.users)
        if decoded.items:
            self._learn_items(decoded.items, records, dead)
        rankings, interactions = self._fresh(decoded.rankings, decoded.interactions)
        self.newest = float(np.fmax(self.newest, decoded.newest))
        self.watermarks.observe(chunk.partition, decoded.newest, clock)
        if chunk.ended:
            self.watermarks.finish(chunk.partition)
        shown = self.pending.add(rankings)
        letters = _Letters(records)
        for number, why in shown.refused.items():
            place, event = int(rankings.record[number]), int(rankings.event[number])
            dead.append(letters.of(place, Reason.SCHEMA, why, event))
        emitted = self.joiner.add(rankings, interactions, shown)
        self.watermark = self.watermarks.value(clock)
        self._push(emitted, self.joiner.advance(self.watermark))
        for number in emitted.foreign.tolist():
            place, event = int(interactions.record[number]), int(interactions.event[number])
            dead.append(letters.of(place, Reason.UNKNOWN_ITEM, _FOREIGN, event))
        self._seen.forget(np.array(letters.events, np.int64))  # one that is sent again is to be looked at again
        counts["rankings"] += len(rankings) - len(shown.refused)
        counts["interactions"] += len(interactions) - len(emitted.foreign)
        self._bury(dead)
        self._judge(decoded.n, len(dead))

    def advance(self, clock: float) -> None:
        """Ends the windows that have passed; to be called now and then where nothing comes."""
        self.watermark = self.watermarks.value(clock)
        self._push(self.joiner.advance(self.watermark))

    def _push(self, *emitted: Emitted) -> None:
        self.counts["examples"] += sum(map(len, emitted))
        self.ready.push(*emitted)
        if not len(self.ready):  # nobody waits for what is freed
            self.pending.release(self.ready.free())

    def assign(self, partitions: Sequence[int], clock: float) -> None:
        """Partitions that are waited for, also before anything came of them."""
        for partition in partitions:
            self.watermarks.observe(partition, float("nan"), clock)

    def turn_to(self, bundle: Bundle) -> None:
        """Goes on over another bundle's items, which item events hold on to; it reads features as the one before."""
        self._bundle_catalogue = bundle.catalogue
        self._begin_catalogue()

    @property
    def items(self) -> Mapping[str, Mapping[str, object]]:
        """What events said of items: id -> feature -> value."""
        return self._items

    def join_counts(self) -> dict[str, int]:
        """What became of impressions and interactions (`Joiner.counts`)."""
        return dict(self.joiner.counts)

    def open(self) -> dict[str, int]:
        """What is not decided yet (`Joiner.waiting`)."""
        return self.joiner.waiting()

    def _fresh(self, rankings: Rankings, interactions: Interactions) -> tuple[Rankings, Interactions]:
        """Without the events that were seen before."""
        new = self._seen.new(np.concatenate([rankings.event, interactions.event]))
        self.counts["duplicates"] += len(new) - int(new.sum())
        if new.all():
            return rankings, interactions
        some, others = new[: len(rankings)], new[len(rankings) :]
        kept = np.flatnonzero(some).tolist()
        columns = {n: getattr(rankings, n)[some] for n in ("event", "request", "seconds", "record")}
        fresh = replace(rankings, data=[rankings.data[n] for n in kept], **columns)
        names = ("event", "request", "item", "code", "seconds", "user", "record")
        return fresh, replace(interactions, **{n: getattr(interactions, n)[others] for n in names})

    def _learn_items(self, events: Sequence[Event], records: Sequence[LogRecord], dead: list[Dead]) -> None:
        """Items' own events change the catalogue, for the rankings of this chunk already."""
        given = [(canonical(e.data.item), e.data.features) for e in events if isinstance(e.data, ItemData)]
        try:
            self._update_catalogue(given)
        except SchemaError:
            for (item, features), event in zip(given, events, strict=True):
                try:
                    self._update_catalogue([(item, features)])
                except SchemaError as error:
                    self.counts["items"] -= 1
                    dead.append(Dead.of(_record_of(event, records), Reason.SCHEMA, str(error)))

    def _update_catalogue(self, given: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        ids, features = [item for item, _ in given], [its for _, its in given]
        self.catalogue = self.catalogue.updated(ids, features, self.encoder)
        for item, its in given:
            self._items.setdefault(item, {}).update(its)
        self.pending.catalogue = self.catalogue
        self.changed_rows.append(self.catalogue.rows(ids))

    # ------------------------------------------------------------------------------------------- dead letters
    def _bury(self, dead: Sequence[Dead]) -> None:
        """Durable before the positions go on; waits where the log does not answer."""
        self.counts["dead"] += len(dead)
        self._dead.bury(dead, self._stopped)

    def _judge(self, events: int, dead: int) -> None:
        """The breaker: stops where most of the newest events are dead."""
        self._judged.append((events, dead))
        total = sum(n for n, _ in self._judged)
        while total - self._judged[0][0] >= JUDGED:
            total -= self._judged.popleft()[0]
        bad = sum(n for _, n in self._judged)
        if total >= JUDGED and bad > self.learning.dead_share * total:
            raise EventError(
                f"{bad:,} of the newest {total:,} events are dead letters (learning.dead_share allows "
                f"{self.learning.dead_share:.0%}): look at them with `plexrank events dead list`, mend what sends "
                "them, and start again; nothing was lost"
            )

    # ------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays."""
        parts: dict[str, Mapping[str, np.ndarray]] = {
            "seen": self._seen.state(),
            "join": self.joiner.state(),
            "pending": self.pending.state(),
            "ready": self.ready.state(),
            "watermarks": self.watermarks.state(),
        }
        found = {f"{part}/{name}": value for part, its in parts.items() for name, value in its.items()}
        found["items"] = np.frombuffer(msgspec.json.encode(self._items), np.uint8)
        found["counts"] = np.frombuffer(msgspec.json.encode(self.counts), np.uint8)
        return found

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from there exactly. CheckpointError where the state is of other tasks or windows."""

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {n.removeprefix(f"{prefix}/"): v for n, v in state.items() if n.startswith(f"{prefix}/")}

        self._items = msgspec.json.decode(state["items"].tobytes())
        self.counts = Counter(msgspec.json.decode(state["counts"].tobytes()))
        self._begin_catalogue()
        self._seen.load(part("seen"))
        self.joiner.load(part("join"))
        self.pending.load(part("pending"))
        self.ready.load(part("ready"))
        self.watermarks.load(part("watermarks"))

    def _begin_catalogue(self) -> None:
        """The bundle's, with all that events said of items."""
        self.catalogue = self._bundle_catalogue
        if self._items:
            self.catalogue = self.catalogue.updated([*self._items], [*self._items.values()], self.encoder)
        self.pending.catalogue = self.catalogue


def interaction_types(config: Config, tasks: Sequence[str]) -> dict[str, list[str]]:
    """task -> interaction types that make it positive; `Joiner` refuses a task that the model does not have."""
    default = {task: config.serving.positive_interactions if task == tasks[0] else [task] for task in tasks}
    return default | config.learning.join.labels


class _Letters:
    """Dead letters of a chunk's records. events: of whom there is one, int64 fingerprints of source and id."""

    def __init__(self, records: Sequence[LogRecord]) -> None:
        self.events: list[int] = []
        self._records = records
        self._batches: dict[int, tuple[pa.Table, dict[int, int]]] = {}

    def of(self, place: int, reason: Reason, detail: str, event: int) -> Dead:
        """Of a batch, only the row that holds the event."""
        self.events.append(event)
        record = self._records[place]
        if not is_batch(record):
            return Dead.of(record, reason, detail)
        if place not in self._batches:
            _, table = decode_batch(record.value)
            names = map(event_name, table.column("source").to_pylist(), table.column("id").to_pylist())
            prints = fingerprints(names).tolist()
            self._batches[place] = table, dict(zip(reversed(prints), reversed(range(len(prints))), strict=True))
        table, rows = self._batches[place]
        return Dead.of(record, reason, detail, rows[event], row_of(table, rows[event]))


def _record_of(event: Event, records: Sequence[LogRecord]) -> LogRecord:
    """Where an item's event came in; one in binary mode has the item's key alone to be known by."""
    same = (r for r in records if r.value == event.value)
    found = next(same, None) or next((r for r in records if r.key == event.key), None)
    return records[-1] if found is None else found
