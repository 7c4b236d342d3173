"""Readers of the log on disk, beside the process that writes it; siblings; files of the older format."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.components import LogReader, LogRecord
from engine.errors import EventError, LogGap, LogUnavailable
from plugins.events.local import LocalEventLog
from plugins.events.segment import BEGINNING, Segment, encode

PATIENCE = 20.0


def open_log(folder: Path, **options: Any) -> LocalEventLog:
    return LocalEventLog(LocalEventLog.Options.model_validate({"path": str(folder), "fsync": "never"} | options))


def gather(reader: LogReader, count: int) -> list[LogRecord]:
    found: list[LogRecord] = []
    until = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        found += reader.poll(1000, 0.1)
    return found


def start_writer(folder: Path, count: int) -> int:
    """A child process that appends `count` records to two partitions, then waits to be killed -> its id."""
    child = os.fork()
    if child:
        return child
    try:
        log = open_log(folder, segment_bytes=4096, partitions=2)
        for n in range(count):
            log.append([(f"user {n % 7}", b"%d " % n + b"x" * (n % 300))])
            if n % 50 == 0:
                time.sleep(0.01)
        time.sleep(PATIENCE)
    finally:
        os._exit(1)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_reader_in_another_process_gets_each_record_once_while_segments_roll(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    open_log(folder, partitions=2).close()
    reader = open_log(folder, read_only=True).reader(None)
    writer = start_writer(folder, 2000)
    found = gather(reader, 2000)
    kill(writer)
    assert sorted(int(r.value.split()[0]) for r in found) == list(range(2000))
    for partition in (0, 1):
        offsets = [r.offset for r in found if r.partition == partition]
        assert offsets == list(range(len(offsets)))
    assert len(list((folder / "0000").glob("*.log"))) > 3
    assert reader.lag() == {0: 0, 1: 0}


def test_a_reader_waits_for_what_its_own_process_appends(tmp_path: Path) -> None:
    log = open_log(tmp_path / "events")
    reader = log.reader({0: 0})
    late = threading.Timer(0.05, lambda: log.append([("k", b"there")]))
    late.start()
    assert [r.value for r in reader.poll(10, PATIENCE)] == [b"there"]
    late.join()
    log.close()


def test_a_reader_goes_on_past_a_torn_tail_and_after_the_writer_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    log = open_log(folder)
    log.append([("k", b"one")])
    reader = open_log(folder, read_only=True).reader(None)
    assert [r.value for r in gather(reader, 1)] == [b"one"]
    torn = encode(1, b"k", b"never answered")[:-3]
    with next((folder / "0000").glob("*.log")).open("ab") as file:
        file.write(torn)  # the writer dies here
    assert reader.poll(10, 0.05) == []
    log.close()
    log = open_log(folder)
    log.append([("k", b"two")])
    assert [(r.offset, r.value) for r in gather(reader, 1)] == [(1, b"two")]
    log.close()


@pytest.mark.parametrize("other_process", [False, True])
def test_a_reader_that_retention_overtook_is_told(tmp_path: Path, other_process: bool) -> None:
    folder = tmp_path / "events"
    log = open_log(folder, segment_bytes=4096, retention_bytes=9000)
    log.append([("k", b"first")])
    source = open_log(folder, read_only=True) if other_process else log
    reader = source.reader(None)
    assert len(gather(reader, 1)) == 1
    for _ in range(40):
        log.append([("k", b"x" * 1000)])
    begin = log.begins()[0]
    assert begin > 1
    with pytest.raises(LogGap, match=rf"offset \d+ is no longer there, the oldest is {begin}: retention was quicker"):
        gather(reader, 1000)
    reader.seek(log.begins())
    assert [r.offset for r in gather(reader, 41 - begin)] == list(range(begin, 41))
    log.close()


def test_a_log_that_was_deleted_and_begun_anew_is_a_gap_and_another_identity(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    log = open_log(folder)
    log.append([("k", b"%d" % n) for n in range(10)])
    beside = open_log(folder, read_only=True)
    reader, before = beside.reader({0: 10}), beside.identity
    assert reader.poll(1, 0.01) == []
    log.close()
    shutil.rmtree(folder)
    log = open_log(folder)
    log.append([("k", b"new")])
    with pytest.raises(LogGap, match="offset 10 lies beyond the end, 1: the log was begun anew"):
        gather(reader, 1)
    with pytest.raises(LogUnavailable, match="another log was begun in this folder"):
        beside.health()
    assert log.identity != before
    log.close()


def test_a_log_that_nobody_has_begun_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable, match="no event log here yet; start the server"):
        open_log(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_siblings_are_written_by_whoever_appends_first_and_read_by_all(tmp_path: Path) -> None:
    """As a server and a learner do: the one owns the events, the other their siblings."""
    server = open_log(tmp_path / "events", partitions=3)
    learner = open_log(tmp_path / "events", partitions=3, read_only=True)
    follower = server.sibling("deltas", partitions=1)
    reader = follower.reader(None)
    deltas = learner.sibling("deltas", partitions=1)
    assert follower.identity == deltas.identity != server.identity
    assert deltas.append([("m", b"delta")]) == [(0, 0)]
    assert [r.value for r in gather(reader, 1)] == [b"delta"]
    with pytest.raises(EventError, match=r"events-deltas: process \d+ writes this event log"):
        follower.append([("m", b"of the wrong one")])
    assert learner.sibling("dead").ends() == {0: 0, 1: 0, 2: 0}
    with pytest.raises(EventError, match="for reading only"):
        learner.append([("k", b"v")])
    deltas.close()
    assert follower.append([("m", b"now it may")]) == [(0, 1)]
    with pytest.raises(EventError, match="3 partitions and the configuration says 2"):
        server.sibling("dead", partitions=2)
    for bad in ("", "../events", "A", "x/y", "x" * 65):
        with pytest.raises(EventError, match="must match"):
            server.sibling(bad)
    follower.close()
    server.close()


def test_a_compact_sibling_outlives_retention(tmp_path: Path) -> None:
    log = open_log(tmp_path / "events", segment_bytes=4096, retention_bytes=4096)
    models = log.sibling("models", partitions=1, compact=True)
    models.append([("model a", b"pointer")])
    for n in range(30):
        models.append([("model b", b"%d" % n * 500)])
    assert next(iter(models.read({0: 0}, 1))).value == b"pointer"
    models.close()
    log.close()


def old_record(offset: int, key: bytes, value: bytes) -> bytes:
    body = struct.pack("<QI", offset, len(key)) + key + value
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


def test_files_of_format_1_are_read_and_followed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "events" / "0000"
    folder.mkdir(parents=True)
    old = [old_record(n, b"anna" if n % 2 else b"bert", b"old %d" % n) for n in range(6)]
    (folder / f"{0:020d}.log").write_bytes(b"".join(old[:4]))
    (folder / f"{4:020d}.log").write_bytes(b"".join(old[4:]) + b"torn")
    log = open_log(tmp_path / "events")
    assert log.append([("anna", b"new")], [(("h", b"v"),)]) == [(0, 6)]
    records = list(log.read({0: 0}, 100))
    assert [r.value for r in records] == [b"old %d" % n for n in range(6)] + [b"new"]
    assert [r.seconds for r in records[:6]] == [None] * 6
    assert records[6].headers == (("h", b"v"),)
    reader = log.reader({0: 3})
    assert [r.offset for r in gather(reader, 4)] == [3, 4, 5, 6]
    assert log.position_at(records[6].seconds or 0) == {0: 6}
    assert log.erase("anna") == 4
    log.close()
    log = open_log(tmp_path / "events")
    assert [r.value for r in log.read({0: 0}, 100)] == [b"old 0", b"old 2", b"old 4"]
    assert log.append([("anna", b"again")]) == [(0, 7)]
    log.close()


def test_an_empty_file_of_format_1_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "events" / "0000"
    folder.mkdir(parents=True)
    (folder / f"{0:020d}.log").touch()
    log = open_log(tmp_path / "events")
    assert log.append([("k", b"v")]) == [(0, 0)]
    assert [r.value for r in log.read({0: 0})] == [b"v"]
    log.close()


def test_a_file_of_a_format_to_come_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{0:020d}.log"
    path.write_bytes(b"plexlog\x03" + b"whatever")
    with pytest.raises(EventError, match="written in format 3, and this version reads up to 2: take a newer plexrank"):
        Segment(path, 0)


HEADERS = st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=50)), max_size=5).map(tuple)
TIMES = st.none() | st.floats(-1e12, 1e12)


@given(st.lists(st.tuples(st.text(max_size=30), st.binary(max_size=300), TIMES, HEADERS), max_size=20))
def test_what_is_encoded_is_decoded(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    path = tmp_path_factory.mktemp("segment") / f"{7:020d}.log"
    data = [encode(7 + n, k.encode(), v, s, h) for n, (k, v, s, h) in enumerate(records)]
    path.write_bytes(BEGINNING + b"".join(data))
    found = list(Segment(path, 5).records(0, path.stat().st_size))
    assert found == [LogRecord(5, 7 + n, k, v, s, h) for n, (k, v, s, h) in enumerate(records)]


@given(st.data())
def test_a_byte_changed_anywhere_gives_no_wrong_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("segment") / f"{0:020d}.log"
    whole = [encode(n, b"key %d" % n, b"value %d" % n, 1.5, (("h", b"x"),)) for n in range(8)]
    stored = bytearray(BEGINNING + b"".join(whole))
    at = data.draw(st.integers(len(BEGINNING), len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(stored)
    good = [LogRecord(0, n, f"key {n}", b"value %d" % n, 1.5, (("h", b"x"),)) for n in range(8)]
    found = [record for record, _ in Segment(path, 0).walk(0, len(stored))]
    assert found == good[: len(found)]
    assert len(found) < 8


def test_times_are_found_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("plugins.events.partition.time.time", lambda: clock[0])
    log = open_log(tmp_path / "events", segment_bytes=4096)
    for n in range(40):
        clock[0] = 1000.0 + n // 2  # two records each second
        log.append([("k", b"x" * 500)])
    for seconds, offset in [(0, 0), (1000, 0), (1000.5, 2), (1010, 20), (1019, 38), (1019.5, 40), (2000, 40)]:
        assert log.position_at(seconds) == {0: offset}
    log.close()


def test_a_full_disk_keeps_whole_records_that_a_reader_may_have_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path / "events")
    reader = open_log(tmp_path / "events", read_only=True).reader(None)
    from plugins.events import partition

    def full(out: Any, data: bytes) -> None:
        out.write(data[: len(data) - 5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(partition, "_write_all", full)
        with pytest.raises(LogUnavailable, match="No space left on device"):
            log.append([("k", b"whole"), ("k", b"torn off")])
    assert log.append([("k", b"after")]) == [(0, 1)]
    assert [(r.offset, r.value) for r in gather(reader, 2)] == [(0, b"whole"), (1, b"after")]
    log.close()


def test_an_erased_key_is_hidden_from_readers_in_other_processes_also_after_the_compaction(tmp_path: Path) -> None:
    log = open_log(tmp_path / "events", segment_bytes=4096)
    for n in range(40):
        log.append([("anna" if n % 2 else "bert", b"%d " % n + b"x" * 200)])
    reader = open_log(tmp_path / "events", read_only=True).reader(None)
    assert len(reader.poll(10, 0.1)) == 10
    log.erase("anna")
    log.compact()
    rest = gather(reader, 15)
    assert [int(r.value.split()[0]) for r in rest] == list(range(10, 40, 2))
    assert reader.poll(10, 0.05) == []
    log.close()


def test_kill_9_of_a_writer_beside_a_reader_loses_and_repeats_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    open_log(folder, partitions=2).close()
    reader = open_log(folder, read_only=True).reader(None)
    found: list[LogRecord] = []
    rng = random.Random(3)
    for _ in range(4):
        writer = start_writer(folder, 100_000)
        found += gather(reader, rng.randrange(100, 400))
        kill(writer)
    found += reader.poll(1_000_000, 0.2)
    for partition in (0, 1):
        offsets = [r.offset for r in found if r.partition == partition]
        assert offsets == list(range(len(offsets)))
    log = open_log(folder, partitions=2)
    assert sum(log.ends().values()) == len(found)
    log.close()
