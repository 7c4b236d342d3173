"""The contract of an event log's readers."""

from __future__ import annotations

import time
from collections.abc import Mapping

from engine.components import EventLog, LogReader, LogRecord
from engine.errors import LogGap
from engine.testing.contract import Contract

PATIENCE = 20.0
"""Seconds that a reader has to give what is there: a broker's first answer takes a while."""


def check_readers(contract: Contract, log: EventLog) -> None:
    """From positions on, in order, at most `limit`; what comes later; pause, seek, lag; a gap is told."""
    log.append([(f"reader {n % 5}", f"{n}".encode()) for n in range(40)])
    begins, ends = log.begins(), log.ends()
    stored = [record for p in ends for record in log.read({p: begins[p]}, 100_000)]
    with contract.when("in reader"):
        reader = log.reader(begins)
    try:
        few = _until(contract, reader, 1, limit=7)
        contract.holds(len(few) <= 7, "must give at most `limit` records in a poll")
        rest = _until(contract, reader, len(stored) - len(few))
        contract.holds(_by_place(few + rest) == _by_place(stored), "must give a reader what `read` gives, once each")
        _in_order(contract, few + rest)
        contract.holds(reader.positions == ends, f"must stand at the ends, {ends}, not at {reader.positions}")
        contract.holds(reader.poll(10, 0.05) == [], "must give [] at the end, when the time is over")
        contract.holds(set(reader.lag().values()) <= {0}, "must have no lag at the end")
        _later(contract, log, reader)
        _paused(contract, log, reader)
        reader.seek(begins)
        again = _until(contract, reader, len(stored))
        contract.holds(_by_place(again).keys() >= _by_place(stored).keys(), "must go on from where it was sought to")
    finally:
        reader.close()
    _part(contract, log)
    _gaps(contract, log)


def _until(contract: Contract, reader: LogReader, count: int, limit: int = 1000) -> list[LogRecord]:
    """Polls until `count` records came, or patience ended."""
    found: list[LogRecord] = []
    until = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        with contract.when("in poll"):
            found += reader.poll(limit, 0.2)
    contract.holds(len(found) >= count, f"must give a reader all records within {PATIENCE:.0f} s: {len(found)} came")
    return found


def _by_place(records: list[LogRecord]) -> Mapping[tuple[int, int], tuple[str, bytes]]:
    return {(r.partition, r.offset): (r.key, r.value) for r in records}


def _in_order(contract: Contract, records: list[LogRecord]) -> None:
    for partition in {r.partition for r in records}:
        offsets = [r.offset for r in records if r.partition == partition]
        contract.holds(offsets == sorted(set(offsets)), "must give a partition's records in order, each once")


def _later(contract: Contract, log: EventLog, reader: LogReader) -> None:
    places = log.append([("reader 0", b"later"), ("reader 1", b"later still")])
    found = _until(contract, reader, 2)
    contract.holds(
        sorted((r.partition, r.offset) for r in found) == sorted(places), "must give a reader what is appended later"
    )


def _paused(contract: Contract, log: EventLog, reader: LogReader) -> None:
    ((partition, offset),) = log.append([("reader 0", b"held back")])
    # A record may have been fetched before the pause; it is asked for afterwards, so nothing is lost.
    reader.pause([partition])
    held = [r for _ in range(3) for r in reader.poll(100, 0.05) if r.partition == partition]
    contract.holds(held == [], "must give nothing of a paused partition")
    reader.resume([partition])
    found = _until(contract, reader, 1)
    contract.holds([(r.partition, r.offset) for r in found] == [(partition, offset)], "must go on when it is resumed")


def _part(contract: Contract, log: EventLog) -> None:
    """Exactly the partitions asked for, from the offset asked for."""
    partition, end = max(log.ends().items(), key=lambda entry: entry[1])
    reader = log.reader({partition: end - 2})
    try:
        found = _until(contract, reader, 2)
        contract.holds([r.offset for r in found] == [end - 2, end - 1], "must begin at the offset asked for")
        contract.holds(reader.positions == {partition: end}, "must have exactly the partitions asked for")
    finally:
        reader.close()
    reader = log.reader(None)
    try:
        count = sum(1 for p, at in log.begins().items() for _ in log.read({p: at}, 100_000))
        _until(contract, reader, count)
        contract.holds(reader.positions == log.ends(), "must read all partitions from the oldest where none is named")
    finally:
        reader.close()


def _gaps(contract: Contract, log: EventLog) -> None:
    partition, end = max(log.ends().items(), key=lambda entry: entry[1])
    reader = log.reader({partition: end + 1000})
    until = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < until:
            reader.poll(10, 0.1)
    except LogGap:
        return
    finally:
        reader.close()
    contract.fails("must raise LogGap where a reader's position lies beyond the end")
