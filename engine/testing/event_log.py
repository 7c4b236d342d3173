"""The contract of event logs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from engine.components import EventLog, LogRecord
from engine.testing.contract import Contract, Options
from engine.testing.state_store import placed


def check_event_log(cls: type[EventLog], options: Options = None) -> None:
    """Order within a partition, reading from a position, erasing, many threads at once.

    An option `path` that is not given leads into a temporary folder. A log on a server should be given an empty one.
    """
    with tempfile.TemporaryDirectory() as folder:
        contract = Contract("event_logs", cls, placed(cls, options, Path(folder) / "events"))
        with contract.when("when it was made"):
            log = cls(contract.options)
        try:
            _order(contract, log)
            _positions(contract, log)
            _erasure(contract, log)
            _threads(contract, log)
        finally:
            log.close()


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


def _erasure(contract: Contract, log: EventLog) -> None:
    before = _all(contract, log)
    with contract.when("in erase"):
        gone = log.erase("user 1")
    contract.holds(gone == 10, f"must say how many records it erased: 10, not {gone}")
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
