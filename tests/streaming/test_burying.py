"""Events that the join refuses, letters that are larger than a record may be: all are buried, and can be sent again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.bundle import Bundle
from engine.components import LogRecord
from engine.config import Config
from engine.errors import EventError
from engine.events import Reason
from engine.streaming.events.arrow_events import encode_batch
from engine.streaming.events.dead import Dead, DeadLetters
from engine.streaming.join.dedupe import SeenEvents
from engine.streaming.learning import joining
from engine.streaming.learning.fetch import Chunk
from engine.streaming.learning.joining import EventsJoined
from tests.streaming.film_stream import BEGIN, click, ranking
from tests.streaming.memory_log import MemoryLog

MOST = 1 << 20


class Broker(MemoryLog):
    """Takes records of 1 MiB, key and value together."""

    def append(self, events, headers=None):  # type: ignore[no-untyped-def]
        for key, value in events:
            if len(key.encode()) + len(value) > MOST:
                raise EventError("an event is larger than the brokers take")
        return super().append(events, headers)


def bury(record: LogRecord, log: MemoryLog) -> DeadLetters:
    letters = DeadLetters(log)
    letters.dead = Broker(stream="films.dead", world=log.world)
    letters.write([Dead.of(record, Reason.JSON, "why")])
    return letters


@pytest.mark.parametrize(
    ("key", "value", "headers"),
    [
        ("u", b"v" * 400_000, (("ce_id", b"h" * 500_000),)),
        ("u", b"v", tuple((f"x{n}", b"\xff" * 1000) for n in range(990))),
        ("u", b"v", (("\x01" * 200_000, b""),)),
        ("k" * 900_000, b"v", ()),
        ("\x00item\x00" * 100_000, b"v", ()),
        ("ü" * 2_000, b"v" * 590_000, ()),
    ],
)
def test_whatever_a_broker_takes_can_be_buried_and_sent_again_as_it_was(
    key: str, value: bytes, headers: tuple[tuple[str, bytes], ...]
) -> None:
    log = MemoryLog()
    ((partition, offset),) = log.append([(key, value)], [headers])
    letters = bury(LogRecord(partition, offset, key, value, None, headers), log)
    assert letters.list()[0].key == key.encode()[:1024].decode(errors="ignore")
    assert letters.resubmit() == {"resubmitted": 1, "already": 0, "gone": 0, "unknown": 0}
    again = log.records[-1]
    assert (again.key, again.value, again.headers) == (key, value, headers)


@pytest.fixture
def joined(tiny_bundle: Path) -> EventsJoined:
    bundle = Bundle.open(tiny_bundle, verify=False)
    config = Config.model_validate(bundle.config.model_dump(mode="json"))
    return EventsJoined(config, bundle, DeadLetters(MemoryLog()), stopped=lambda: False)


def chunk(values: list[bytes], begin: int = 0) -> Chunk:
    records = [LogRecord(0, begin + n, "u1", value, BEGIN + 100) for n, value in enumerate(values)]
    return Chunk(0, records, begin + len(records))


def test_an_event_that_the_join_refused_is_looked_at_again_when_it_is_resubmitted(joined: EventsJoined) -> None:
    bad = msgspec.json.decode(ranking("r-bad", "u1", ["1"], BEGIN))
    bad["data"]["item_features"] = {"year": ["many"]}
    values = [
        msgspec.json.encode(bad),
        ranking("r", "u1", ["1", "2"], BEGIN),
        click("foreign", "u1", "29", "r", BEGIN + 1),
        click("good", "u1", "1", "r", BEGIN + 1),
    ]
    joined.take(chunk(values), 0.0)
    assert (joined.counts["dead"], joined.counts["duplicates"]) == (2, 0)
    joined.take(chunk(values, 4), 0.0)
    assert (joined.counts["dead"], joined.counts["duplicates"]) == (4, 2), "the good ones are copies"


def test_a_batch_of_which_many_rows_are_dead_is_decoded_once_for_them(
    joined: EventsJoined, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 300
    columns = {
        "id": [f"c{n}" for n in range(rows)],
        "source": ["films"] * rows,
        "time": [int((BEGIN + 1) * 1e6)] * rows,
        "type": ["click"] * rows,
        "user": ["u1"] * rows,
        "item": [str(n) for n in range(rows)],
        "ranking": ["r"] * rows,
    }
    (batch,) = encode_batch("interaction", columns)
    calls = []
    decode = joining.decode_batch
    monkeypatch.setattr(joining, "decode_batch", lambda value: calls.append(1) or decode(value))
    joined.take(chunk([ranking("r", "u1", ["1", "2"], BEGIN), batch]), 0.0)
    assert joined.counts["dead"] == rows - 2
    assert len(calls) == 1
    letters = DeadLetters(MemoryLog(world=joined._dead.log.world)).list(limit=rows)
    assert {letter.row for letter in letters} == set(range(rows)) - {1, 2}


def test_forgotten_events_are_new_again_also_after_a_checkpoint() -> None:
    seen = SeenEvents(8)
    first = np.arange(1, 7)
    assert seen.new(first).all()
    seen.forget(np.array([2, 3, 99]))
    after = SeenEvents(8)
    after.load(seen.state())
    for its in (seen, after):
        assert its.new(first).tolist() == [False, True, True, False, False, False]
        assert its.new(np.array([10])).tolist() == [True], "8 stand in the ring, of which two are nobody"
        assert its.new(np.array([1, 4])).tolist() == [True, False]
