"""Dead letters: written once, found by reason, sent again as they were, whatever fails in between."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from event_records import FUTURE, LIMITS, NOW, click, record
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_log import MemoryLog

from engine.components import LogRecord
from engine.config import ComponentConfig, default_name
from engine.errors import LogUnavailable
from engine.events import Reason
from engine.plugins import installed
from engine.served import component
from engine.streaming.events.arrow_events import encode_batch
from engine.streaming.events.dead import MOST_BYTES, Dead, DeadLetters
from engine.streaming.events.decode import decode_records


def letter(offset: int, reason: Reason = Reason.JSON, **changes: Any) -> Dead:
    return Dead.of(record(b"\xffnot JSON", offset, **changes), reason, "why it is dead")


class Clock:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = NOW

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


def test_a_letter_keeps_reason_position_bytes_and_headers() -> None:
    log = MemoryLog(partitions=3)
    letters = DeadLetters(log, clock=lambda: NOW)
    bad = record(b"\xff\x00", 7, partition=2, key="ü", headers=(("ce_id", b"\xfe"), ("x", b"")))
    assert letters.write([Dead.of(bad, Reason.SCHEMA, "d" * 900)]) == 1
    (got,) = letters.list()
    assert (got.reason, got.detail, got.stream) == ("schema", "d" * 500, log.identity)
    assert (got.partition, got.offset, got.key, got.value, got.headers) == (2, 7, "ü", bad.value, bad.headers)
    assert (got.first_seen, got.size, got.resubmitted) == (NOW, 2, False)
    stored = log.sibling("dead").records[0]
    assert stored.key == "ü", "erasing a user erases the dead letters, too"
    assert json.loads(stored.value)["value"] == "/wA=", "readable by any tool: base64"


def test_an_event_that_is_read_again_is_not_written_again() -> None:
    log = MemoryLog(partitions=2)
    first = DeadLetters(log)
    assert first.write([letter(1), letter(2), letter(1)]) == 2
    assert first.write([letter(2), letter(3)]) == 1
    after_a_crash = DeadLetters(log)
    assert after_a_crash.write([letter(n) for n in range(5)]) == 2
    assert sorted(x.offset for x in after_a_crash.list()) == [0, 1, 2, 3, 4]
    assert after_a_crash.write([letter(1, partition=1)]) == 1, "another partition is another position"


def test_positions_of_a_log_that_was_begun_anew_are_new() -> None:
    log = MemoryLog()
    DeadLetters(log).write([letter(1)])
    other = MemoryLog(stream="other", world=log.world)
    assert DeadLetters(other).write([letter(1)]) == 1


def test_what_is_remembered_is_bounded_and_the_newest_are_kept() -> None:
    log = MemoryLog()
    letters = DeadLetters(log, remembered=3)
    letters.write([letter(n) for n in range(10)])
    for known in (letters, DeadLetters(log, remembered=3)):
        assert known.write([letter(n) for n in range(7, 10)]) == 0


class HalfWritten(MemoryLog):
    """Writes the first record, then says that it could not be reached."""

    broken = True

    def append(self, events: Any, headers: Any = None) -> list[tuple[int, int]]:
        if self.stream == "dead" and self.broken:
            super().append(events[:1])
            raise LogUnavailable("no answer")
        return super().append(events, headers)

    def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> HalfWritten:
        return HalfWritten(partitions=1, stream=name, world=self.world)


def test_a_write_of_unknown_outcome_may_be_done_again() -> None:
    log = HalfWritten()
    letters = DeadLetters(log)
    with pytest.raises(LogUnavailable):
        letters.write([letter(1), letter(2)])
    letters.dead.broken = False
    assert letters.write([letter(1), letter(2)]) == 1
    assert [x.offset for x in letters.list()] == [1, 2]


def test_the_newest_are_listed_over_all_partitions_and_by_reason() -> None:
    letters = DeadLetters(MemoryLog(partitions=4), clock=Clock())
    for n in range(20):
        letters.write([letter(n, Reason.NAN if n % 5 == 0 else Reason.JSON, key=f"u{n}")])
    assert [x.offset for x in letters.list(limit=3)] == [17, 18, 19]
    assert [x.offset for x in letters.list(limit=2, reason="nan")] == [10, 15]
    assert letters.list(limit=0) == []
    assert letters.list(reason="version") == []


def test_letters_are_sent_again_as_they_were_and_once() -> None:
    log = MemoryLog(partitions=2)
    letters = DeadLetters(log)
    headers = (("ce_id", b"\xff"),)
    letters.write([letter(1, headers=headers), letter(2, Reason.VERSION, key="u2"), letter(3)])
    assert letters.resubmit(which="version") == {"resubmitted": 1, "already": 0, "gone": 0, "unknown": 0}
    assert [(r.key, r.value, r.headers) for r in log.records] == [("u2", b"\xffnot JSON", ())]
    assert DeadLetters(log).resubmit() == {"resubmitted": 2, "already": 1, "gone": 0, "unknown": 0}
    assert sorted(r.headers for r in log.records) == [(), (), headers]
    assert letters.resubmit() == {"resubmitted": 0, "already": 3, "gone": 0, "unknown": 0}
    assert all(x.resubmitted for x in letters.list())
    assert DeadLetters(log).write([letter(1), letter(2, key="u2"), letter(3)]) == 0, "markers hide no positions"


def test_letters_are_chosen_by_their_place_and_go_where_one_says() -> None:
    log, target = MemoryLog(), MemoryLog()
    letters = DeadLetters(log)
    letters.write([letter(n) for n in range(3)])
    place = letters.list()[1].place
    counts = letters.resubmit(target, [place, (0, 99)])
    assert counts == {"resubmitted": 1, "already": 0, "gone": 0, "unknown": 1}
    assert (len(log.records), len(target.records)) == (0, 1)
    assert [x.resubmitted for x in letters.list()] == [False, True, False]


def test_nothing_is_marked_as_sent_while_the_target_is_away() -> None:
    log, target = MemoryLog(), MemoryLog()
    letters = DeadLetters(log)
    letters.write([letter(1)])
    target.down()
    with pytest.raises(LogUnavailable):
        letters.resubmit(target)
    target.down(False)
    assert letters.resubmit(target)["resubmitted"] == 1


def test_a_value_too_long_to_be_copied_is_read_where_it_stands() -> None:
    log = MemoryLog()
    ((partition, offset),) = log.append([("u1", b"x" * (MOST_BYTES + 1))])
    letters = DeadLetters(log)
    letters.write([Dead.of(r, Reason.JSON, "not JSON") for r in log.records])
    (got,) = letters.list()
    assert (got.value, got.size) == (None, MOST_BYTES + 1)
    assert len(log.sibling("dead").records[0].value) < 1000
    target = MemoryLog()
    assert letters.resubmit(target)["resubmitted"] == 1
    assert target.records[0].value == b"x" * (MOST_BYTES + 1)
    letters.write([Dead.of(LogRecord(partition, offset + 1, "u1", b"y" * (MOST_BYTES + 1)), Reason.JSON, "")])
    assert letters.resubmit(target) == {"resubmitted": 0, "already": 1, "gone": 1, "unknown": 0}


def test_an_erased_user_has_no_dead_letters() -> None:
    letters = DeadLetters(MemoryLog())
    letters.write([letter(1), letter(2, key="u2")])
    letters.dead.erase("u1")
    assert [x.key for x in letters.list()] == ["u2"]
    assert letters.resubmit()["resubmitted"] == 1


def test_a_row_of_a_batch_is_a_letter_of_its_own_and_can_be_sent_again() -> None:
    columns = {
        **{name: ["a", "b", "c"] for name in ("id", "source", "type", "user", "ranking")},
        "time": [0, 1, 2],
        "item": ["i1", "i" * 300, "i\n"],
    }
    log = MemoryLog()
    log.append([("batch", record_) for record_ in encode_batch("interaction", columns)])
    letters = DeadLetters(log)
    got = decode_records(log.records, LIMITS, NOW, FUTURE)
    assert letters.write(got.dead) == 2
    assert DeadLetters(log).write(got.dead) == 0
    assert [(x.row, x.reason) for x in letters.list()] == [(1, "id"), (2, "id")]
    letters.resubmit()
    again = decode_records(log.records[1:], LIMITS, NOW, FUTURE)
    assert (again.n, [d.row for d in again.dead]) == (2, [0, 0])


def test_a_damaged_dead_log_is_still_read() -> None:
    letters = DeadLetters(MemoryLog())
    letters.write([letter(1), letter(2)])
    letters.dead.overwrite(0, 0, b"{")
    assert [x.offset for x in letters.list()] == [2]
    assert DeadLetters(letters.log).resubmit()["resubmitted"] == 1


def test_letters_outlive_the_process_in_the_default_log(tmp_path: Path) -> None:
    use = ComponentConfig(name=default_name("event_logs"), options={"path": str(tmp_path / "events")})
    poison = [("u1", b"{"), ("u2", b"\xff"), ("u1", b'{"id":NaN}')]
    for round_ in range(2):
        log = component(installed(), "event_logs", use)
        if round_ == 0:
            log.append(poison)
        letters = DeadLetters(log)
        read = [r for p, begin in log.begins().items() for r in log.read({p: begin})]
        assert letters.write(decode_records(read, LIMITS, time.time(), FUTURE).dead) == (3 if round_ == 0 else 0)
        assert [(x.key, x.value) for x in letters.list()] == poison
        letters.close()
        log.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
            st.binary(max_size=50),
            st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.binary(max_size=5))),
        ),
        max_size=5,
    )
)
def test_any_key_bytes_and_headers_come_back_as_they_were(raw: list[Any]) -> None:
    letters = DeadLetters(MemoryLog())
    records = [LogRecord(0, n, key, value, None, tuple(headers)) for n, (key, value, headers) in enumerate(raw)]
    letters.write([Dead.of(r, Reason.JSON, "") for r in records])
    letters.resubmit()
    assert [(r.key, r.value, r.headers) for r in letters.log.records] == [(r.key, r.value, r.headers) for r in records]


def test_what_the_decoder_calls_dead_is_what_is_written() -> None:
    log = MemoryLog()
    log.append([("u1", json.dumps(click()).encode()), ("u1", b"{"), ("u2", b'{"id":NaN}')])
    letters = DeadLetters(log)
    letters.write(decode_records(log.records, LIMITS, NOW, FUTURE).dead)
    assert [(x.offset, x.reason, x.value) for x in letters.list()] == [(1, "json", b"{"), (2, "nan", b'{"id":NaN}')]
