"""The contract of event logs: what is appended, looked up and erased."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from engine.components import Capability, EventLog, LogRecord
from engine.testing.contract import Contract, Options
from engine.testing.event_log_readers import check_readers
from engine.testing.state_store import placed

NEEDS = {
    "headers come back as they were given": Capability.HEADERS,
    "records carry the time at which the log took them": Capability.TIMESTAMPS,
    "a position is found by time": Capability.SEEK_TIME,
    "an erased key's records are counted and gone": Capability.ERASE,
}


def check_event_log(cls: type[EventLog], options: Options = None) -> list[str]:
    """Order, positions, readers, siblings, erasing, many threads -> promises left out, as the log lacks what they need.

    An option `path` that is not given leads into a temporary folder. A log on a server should be given an empty one.
    """
    with tempfile.TemporaryDirectory() as folder:
        contract = Contract("event_logs", cls, placed(cls, options, Path(folder) / "events"))
        with contract.when("when it was made"):
            log = cls(contract.options)
        try:
            _order(contract, log)
            _positions(contract, log)
            _headers(contract, log)
            _times(contract, log)
            check_readers(contract, log)
            _siblings(contract, log)
            _erasure(contract, log)
            _threads(contract, log)
        finally:
            log.close()
        return [f"{promise} (needs {need})" for promise, need in NEEDS.items() if need not in log.capabilities]


def _all(contract: Contract, log: EventLog, limit: int = 100_000) -> list[LogRecord]:
    with contract.when("in read"):
        return [record for p in log.ends() for record in log.read({p: 0}, limit)]


def _order(contract: Contract, log: EventLog) -> None:
    with contract.when("in append"):
        contract.holds(log.append([]) == [], "must take no events and answer with no positions")
        events = [(f"user {n % 3}", f'{{"n": {n}, "ü": "\\u0000"}}'.encode()) for n in range(30)]
        positions = log.append(events[:20]) + log.append(events[20:])
    contract.holds(len(positions) == 30, "must answer one position an event")
    of_key = {key: {positions[i][0] for i, (k, _) in enumerate(events) if k == key} for key, _ in events}
    contract.holds(all(len(p) == 1 for p in of_key.values()), "must keep a key's events in one partition")
    stored = {(r.partition, r.offset): (r.key, r.value) for r in _all(contract, log)}
    contract.holds(
        all(stored.get(place) == event for place, event in zip(positions, events, strict=True)),
        "must give back each event, key and bytes, at the position it answered",
    )
    for key, places in of_key.items():
        read = [r.value for r in log.read(dict.fromkeys(places, 0), 1000) if r.key == key]
        contract.holds(read == [v for k, v in events if k == key], "must give a key's events in the order appended")


def _positions(contract: Contract, log: EventLog) -> None:
    with contract.when("in health"):
        log.health()
    contract.holds(log.identity == log.identity != "", "must name itself, always the same")
    begins, ends = log.begins(), log.ends()
    contract.holds(begins.keys() == ends.keys() and begins, "must give `begins` and `ends` of the same partitions")
    contract.holds(all(begins[p] <= ends[p] for p in ends), "must begin before its end")
    for partition, end in log.ends().items():
        records = list(log.read({partition: 0}, 1000))
        offsets = [r.offset for r in records]
        contract.holds(offsets == sorted(set(offsets)), "must give rising offsets in a partition")
        contract.holds(not offsets or offsets[-1] < end, "must say in `ends` what offset the next record gets")
        contract.holds(list(log.read({partition: end}, 10)) == [], "must give nothing from the end on")
        if len(records) > 2:
            later = list(log.read({partition: records[2].offset}, 1000))
            contract.holds(later == records[2:], "must read from the position asked for, including it")
            few = list(log.read({partition: 0}, 2))
            contract.holds(few == records[:2], "must give at most `limit` records")


def _headers(contract: Contract, log: EventLog) -> None:
    given = (("ce_id", b"7"), ("ce_source", "ü".encode()), ("empty", b""))
    with contract.when("in append with headers"):
        places = log.append([("headers", b"a"), ("headers", b"b")], [given, ()])
    found = [next(iter(log.read({p: at}, 1))).headers for p, at in places]
    expected = [given, ()] if Capability.HEADERS in log.capabilities else [(), ()]
    contract.holds(found == expected, f"must give back the headers {expected}, not {found}")


def _times(contract: Contract, log: EventLog) -> None:
    before = time.time()
    time.sleep(0.02)
    ((partition, offset),) = log.append([("times", b"then")])
    record = next(iter(log.read({partition: offset}, 1)))
    if Capability.TIMESTAMPS in log.capabilities:
        contract.holds(
            record.seconds is not None and before <= record.seconds <= time.time() + 60,
            f"must say when it took a record, in seconds: {record.seconds} is not shortly after {before}",
        )
    else:
        contract.holds(record.seconds is None, "must give None as the time where it keeps none")
    if Capability.SEEK_TIME not in log.capabilities:
        return
    ends = log.ends()
    with contract.when("in position_at"):
        found, oldest, never = log.position_at(before), log.position_at(0), log.position_at(time.time() + 3600)
    contract.holds(found == {**ends, partition: offset}, f"must find the first offset taken after a time, not {found}")
    contract.holds(oldest == log.begins(), "must find the oldest record by a time long ago")
    contract.holds(never == ends, f"must give the ends for a time to come, {ends}, not {never}")


def _siblings(contract: Contract, log: EventLog) -> None:
    with contract.when("in sibling"):
        one, again = log.sibling("check-one", partitions=1), log.sibling("check-one", partitions=1)
    before = log.ends()
    try:
        contract.holds(one.identity == again.identity != log.identity, "must give siblings identities of their own")
        places = one.append([("a", b"1"), ("b", b"2"), ("c", b"3")])
        contract.holds([p for p, _ in places] == [0, 0, 0], "must make a sibling with the partitions asked for")
        values = [r.value for r in again.read({0: places[0][1]}, 10)]
        contract.holds(values == [b"1", b"2", b"3"], "must show in a sibling what was written to it elsewhere")
        contract.holds(log.ends() == before, "must keep a sibling's records out of the log beside it")
    finally:
        one.close()
        again.close()
    compact = log.sibling("check-newest", partitions=1, compact=True)
    try:
        compact.append([("model", b"old"), ("other", b"x"), ("model", b"new")])
        newest = {r.key: r.value for r in compact.read(compact.begins(), 100)}
        contract.holds(newest == {"model": b"new", "other": b"x"}, "must keep each key's newest record when compact")
    finally:
        compact.close()


def _erasure(contract: Contract, log: EventLog) -> None:
    before = _all(contract, log)
    with contract.when("in erase"):
        gone = log.erase("user 1")
    expected = 10 if Capability.ERASE in log.capabilities else -1
    contract.holds(gone == expected, f"must say how many records it erased: {expected}, not {gone}")
    after = _all(contract, log)
    contract.holds(
        [r for r in after if r.key == "user 1" and r.value] == [], "must not give an erased key's records any more"
    )
    others = [r for r in before if r.key != "user 1"]
    contract.holds(
        [r for r in after if r.key != "user 1"] == others, "must leave other keys' records and offsets as they were"
    )
    (place,) = log.append([("user 1", b"again")])
    again = [r for r in log.read({place[0]: place[1]}, 10) if r.key == "user 1"]
    contract.holds([r.value for r in again] == [b"again"], "must take events of a key again after it was erased")


def _threads(contract: Contract, log: EventLog) -> None:
    def add(number: int) -> None:
        for step in range(5):
            log.append([(f"thread {number}", f"{number}.{step}".encode())])

    contract.in_threads(add)
    values = [r.value.decode() for r in _all(contract, log) if r.key.startswith("thread ")]
    contract.holds(
        sorted(values) == sorted(f"{n}.{s}" for n in range(4) for s in range(5)),
        "must keep every event exactly once when many threads append",
    )
