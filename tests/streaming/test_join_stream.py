"""From records of a log to examples: copies and disorder within the lateness change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.components import LogRecord
from engine.config_learning import JoinConfig
from engine.events import EventLimits
from engine.hashing import fingerprint
from engine.streaming.events.decode import decode_records
from engine.streaming.join.dedupe import SeenEvents
from engine.streaming.join.join import Joiner
from engine.streaming.join.pending import PendingExamples
from engine.streaming.join.watermark import Watermarks
from tests.streaming.served_world import ENCODER, catalogue

START = 1_700_000_000
WINDOW, LATENESS = 30.0, 10.0


@dataclass(frozen=True)
class Sent:
    """An event: what happened, when, in seconds after the start."""

    id: str
    kind: str
    seconds: int
    data: dict[str, Any]

    def record(self, offset: int) -> LogRecord:
        time = datetime.fromtimestamp(START + self.seconds, UTC).isoformat()
        value = {"id": self.id, "source": "shop", "type": self.kind, "time": time, "data": self.data}
        return LogRecord(0, offset, "ann", msgspec.json.encode(value))


@st.composite
def shop(draw: Any) -> tuple[list[Sent], dict[tuple[str, str], float]]:
    """Events in the order of time, and (ranking, item) -> the label that a look at all of them at once gives."""
    events, labels = [], {}
    for number in range(draw(st.integers(1, 8))):
        request, shown_at = f"r{number}", draw(st.integers(0, 60))
        items = draw(st.lists(st.sampled_from(["1", "2", "книга", "new"]), min_size=1, max_size=3, unique=True))
        history = draw(st.lists(st.sampled_from(["1", "2"]), max_size=3))
        data = {"request_id": request, "user": "ann", "items": [{"id": i} for i in items], "history": history}
        events.append(Sent(request, "ranking", shown_at, data))
        for item in items:
            delay = draw(st.sampled_from([None, None, 0, 1, 29, 30]))
            labels[request, item] = float(delay is not None)
            if delay is not None:
                click = {"type": "click", "user": "ann", "item": item, "ranking": request}
                events.append(Sent(f"{request}-{item}", "interaction", shown_at + delay, click))
    return sorted(events, key=lambda e: e.seconds), labels


def joined(events: list[Sent], sizes: list[int]) -> tuple[dict[tuple[int, int], list[Any]], dict[str, int]]:
    """(request, item) -> (label, ids) of its examples, and the join's counts, of events in chunks of these sizes."""
    seen, pending = SeenEvents(1000), PendingExamples(ENCODER, catalogue())
    joiner = Joiner(
        ["click"], {"click": ["click"]}, JoinConfig(window_seconds=WINDOW, lateness_seconds=LATENESS, late="correct")
    )
    marks = Watermarks(LATENESS, np.inf)
    found: dict[tuple[int, int], list[Any]] = {}

    def keep(emitted: Any) -> None:
        jagged = pending.take(emitted.slot).jagged() if len(emitted) else {}
        for row in range(len(emitted)):
            past, own = jagged["past"].to_dense(), jagged["item"].values()
            key = int(emitted.request[row]), int(emitted.item[row])
            assert int(own[row]) == key[1]
            found.setdefault(key, []).append((float(emitted.labels[row, 0]), past[row].tolist()))
        pending.release(emitted.freed)

    start = 0
    for size in sizes:
        records = [event.record(start + n) for n, event in enumerate(events[start : start + size])]
        start += size
        decoded = decode_records(records, EventLimits(), START + 1e6, 300)
        assert not decoded.dead
        rankings, interactions = decoded.rankings, decoded.interactions
        new = seen.new(np.concatenate([rankings.event, interactions.event]))
        some, others = new[: len(rankings)], new[len(rankings) :]
        kept = type(rankings)(
            [data for data, fresh in zip(rankings.data, some, strict=True) if fresh],
            *(getattr(rankings, name)[some] for name in ("event", "request", "seconds", "record")),
        )
        clicks = type(interactions)(
            *(getattr(interactions, name)[others] for name in ("event", "request", "item")),
            interactions.type,
            *(getattr(interactions, name)[others] for name in ("code", "seconds", "user", "record")),
        )
        keep(joiner.add(kept, clicks, pending.add(kept)))
        marks.observe(0, decoded.newest, 0.0)
        keep(joiner.advance(marks.value(0.0)))
    keep(joiner.advance(np.inf))
    assert len(pending) == 0
    return found, joiner.counts


@settings(deadline=None, max_examples=150)
@given(shop(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_copies_and_disorder_within_the_lateness_change_no_example(
    made: tuple[list[Sent], dict[tuple[str, str], float]], seed: int, copied: float
) -> None:
    events, labels = made
    random = np.random.default_rng(seed)
    # each event is behind those of up to LATENESS seconds after it, and some come again later
    arrival = [(e.seconds + random.uniform(0, LATENESS), e) for e in events]
    arrival += [(at + random.exponential(20), e) for at, e in arrival if random.random() < copied]
    sent = [e for _, e in sorted(arrival, key=lambda a: a[0])]
    cuts = np.sort(random.integers(0, len(sent) + 1, 4))
    found, counts = joined(sent, np.diff([0, *cuts, len(sent)]).tolist())
    past = {e.id: [fingerprint(i) for i in e.data["history"]] for e in events if e.kind == "ranking"}
    expected = {(fingerprint(r), fingerprint(i)): (label, past[r]) for (r, i), label in labels.items()}
    assert {key: (label, [p for p in its if p]) for key, ((label, its),) in found.items()} == expected
    assert counts["late"] == counts["orphans"] == counts["duplicate_rankings"] == counts["repeats"] == 0
    assert counts["joined"] == sum(labels.values())
