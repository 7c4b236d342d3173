"""The log on disk: ordered, durable, whole after a crash, and able to forget."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import mmh3
import pytest

from engine.components import LogRecord
from engine.errors import EventError
from plugins.events.local import LocalEventLog
from plugins.events.segment import encode


def open_log(folder: Path, **options: Any) -> LocalEventLog:
    return LocalEventLog(LocalEventLog.Options.model_validate({"path": str(folder), "fsync": "never"} | options))


def everything(log: LocalEventLog, partition: int = 0) -> list[LogRecord]:
    return list(log.read({partition: 0}, limit=1_000_000))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "0000").glob("*.log"))


def test_what_is_appended_is_read_back_in_order_with_offsets_from_zero(tmp_path: Path) -> None:
    log, begin = open_log(tmp_path), time.time()
    assert log.append([("u1", b"a"), ("u2", b"b")]) == [(0, 0), (0, 1)]
    assert log.append([("u1", b"")]) == [(0, 2)]
    stored = everything(log)
    assert [(r.offset, r.key, r.value) for r in stored] == [(0, "u1", b"a"), (1, "u2", b"b"), (2, "u1", b"")]
    assert all(r.seconds is not None and begin - 1 <= r.seconds <= time.time() for r in stored)
    assert log.ends() == {0: 3}
    log.close()


def test_reading_starts_at_a_position_and_stops_at_the_limit(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([("k", str(n).encode()) for n in range(10)])
    assert [r.value for r in log.read({0: 4}, limit=3)] == [b"4", b"5", b"6"]
    assert list(log.read({0: 10})) == []
    assert list(log.read({0: 99})) == []
    with pytest.raises(EventError, match="no partition 5"):
        list(log.read({5: 0}))
    log.close()


def test_the_bytes_on_disk_are_the_documented_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.events.partition.time.time", lambda: 12.5)
    log = open_log(tmp_path)
    log.append([("ü", b"value")], headers=[(("h", b"xyz"),)])
    log.close()
    headers = struct.pack("<II", 1, 3) + b"hxyz"
    body = struct.pack("<QdII", 0, 12.5, 2, len(headers)) + "ü".encode() + headers + b"value"
    expected = len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body
    assert files(tmp_path)[0].read_bytes() == b"plexlog\x02" + expected


def test_offsets_go_on_after_a_restart(tmp_path: Path) -> None:
    for n in range(3):
        log = open_log(tmp_path)
        assert log.append([("k", b"x")]) == [(0, n)]
        log.close()
    log = open_log(tmp_path)
    assert len(everything(log)) == 3
    log.close()


def test_segments_roll_by_size_and_are_read_across(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=4096)
    values = [os.urandom(900) for _ in range(40)]
    for value in values:
        log.append([("k", value)])
    assert len(files(tmp_path)) == 8  # five records of 933 bytes pass 4096
    assert [path.name for path in files(tmp_path)][:2] == [f"{0:020d}.log", f"{5:020d}.log"]
    assert [r.value for r in everything(log)] == values
    assert [r.value for r in log.read({0: 17}, limit=100)] == values[17:]
    log.close()
    log = open_log(tmp_path, segment_bytes=4096)
    assert [r.value for r in everything(log)] == values
    log.close()


@pytest.mark.parametrize("cut", [1, 7, 8, 15, 20])
def test_a_torn_tail_is_cut_off_at_start_and_nothing_else_is_lost(tmp_path: Path, cut: int) -> None:
    log = open_log(tmp_path)
    log.append([("k", b"first"), ("k", b"second")])
    log.close()
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-cut])
    log = open_log(tmp_path)
    assert [r.value for r in everything(log)] == [b"first"]
    assert log.append([("k", b"third")]) == [(0, 1)]
    log.close()
    log = open_log(tmp_path)
    assert [r.value for r in everything(log)] == [b"first", b"third"]
    log.close()


def test_random_bytes_after_the_last_record_are_cut_off(tmp_path: Path) -> None:
    rng = random.Random(5)
    for round_ in range(30):
        folder = tmp_path / str(round_)
        log = open_log(folder)
        log.append([("k", b"kept")])
        log.close()
        with files(folder)[0].open("ab") as file:
            file.write(rng.randbytes(rng.randrange(1, 200)))
        log = open_log(folder)
        assert [r.value for r in everything(log)] == [b"kept"]
        log.close()


def test_a_damaged_record_in_a_full_segment_is_an_error_that_names_the_byte(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=4096)
    for _ in range(10):
        log.append([("k", b"x" * 900)])
    first = files(tmp_path)[0]
    data = bytearray(first.read_bytes())
    data[1000] ^= 1  # in the second record
    first.write_bytes(data)
    log.close()
    log = open_log(tmp_path, segment_bytes=4096)
    reader = log.read({0: 0}, limit=100)
    assert next(reader).offset == 0
    with pytest.raises(EventError, match=rf"{first.name}: damaged at byte 941"):
        next(reader)
    assert [r.offset for r in log.read({0: 5}, limit=100)] == [5, 6, 7, 8, 9]
    log.close()


def test_keys_go_to_their_partition_and_keep_their_order_there(tmp_path: Path) -> None:
    log = open_log(tmp_path, partitions=4)
    events = [(f"user-{n % 9}", str(n).encode()) for n in range(90)]
    places = log.append(events)
    for (key, _), (partition, _) in zip(events, places, strict=True):
        assert partition == mmh3.hash(key, 0, signed=False) % 4
    for partition in range(4):
        numbers = [int(r.value) for r in log.read({partition: 0}, limit=100)]
        assert numbers == sorted(numbers)
    assert sum(log.ends().values()) == 90
    log.close()
    with pytest.raises(EventError, match="the log has 4 partitions and the configuration says 2"):
        open_log(tmp_path, partitions=2)


def test_an_erased_key_is_never_read_again_and_its_bytes_go(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=4096)
    for n in range(30):
        log.append([("anna", f"anna-secret-{n}".encode() + b"." * 300), ("bert", f"bert-{n}".encode())])
    assert log.erase("anna") == 30
    assert {r.key for r in everything(log)} == {"bert"}
    log.append([("anna", b"came back")])  # what happens later is hers again
    log.close()  # waits for the compaction
    held = b"".join(path.read_bytes() for path in (tmp_path / "0000").iterdir())
    assert b"anna-secret" not in held
    log = open_log(tmp_path)
    records = everything(log)
    assert [r.value for r in records if r.key == "anna"] == [b"came back"]
    assert [r.value for r in records if r.key == "bert"] == [f"bert-{n}".encode() for n in range(30)]
    assert [r.offset for r in records if r.key == "bert"] == list(range(1, 60, 2)), "offsets do not move"
    assert log.erase("nobody") == 0
    log.close()


def test_a_tombstone_holds_across_a_restart_before_any_compaction(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([("anna", b"1"), ("bert", b"2")])
    log._partitions[0].erase("anna")  # no compaction follows
    assert b"anna" in files(tmp_path)[0].read_bytes()
    assert b"anna" not in (tmp_path / "0000" / "erased").read_bytes(), "the tombstone itself names nobody"
    reader = open_log(tmp_path, read_only=True)
    assert [r.key for r in everything(reader)] == ["bert"]
    reader.close()
    log.close()
    log = open_log(tmp_path)  # compacts what was left over
    assert [r.key for r in everything(log)] == ["bert"]
    log.close()
    assert b"anna" not in b"".join(path.read_bytes() for path in (tmp_path / "0000").iterdir())


def test_a_reader_that_was_under_way_is_not_disturbed_by_a_compaction(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=4096)
    for n in range(60):
        log.append([("anna" if n % 2 else "bert", f"{n:03d}".encode() * 60)])
    reader = log.read({0: 0}, limit=100)
    first = next(reader)
    log._partitions[0].erase("anna")
    assert log.compact() > 0
    rest = list(reader)
    assert [r.offset for r in [first, *rest] if r.key == "bert"] == list(range(0, 60, 2))
    log.close()


def test_old_segments_go_by_size_and_by_age(tmp_path: Path) -> None:
    log = open_log(tmp_path / "size", segment_bytes=4096, retention_bytes=12_000)
    for _ in range(60):
        log.append([("k", b"x" * 1000)])
    total = sum(path.stat().st_size for path in files(tmp_path / "size"))
    assert total <= 12_000 + 2 * 5105
    kept = everything(log)
    assert kept[0].offset > 0
    assert kept[-1].offset == 59
    log.close()
    log = open_log(tmp_path / "age", segment_bytes=4096, retention_hours=1.0)
    for n in range(12):
        log.append([("k", b"x" * 1000)])
        if n == 5:
            for path in files(tmp_path / "age"):
                os.utime(path, (0, time.time() - 7200))
    assert everything(log)[0].offset >= 4
    log.close()


def test_two_processes_may_not_write_one_log(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(EventError, match=r"process \d+ writes this event log"):
        open_log(tmp_path)
    reader = open_log(tmp_path, read_only=True)
    log.append([("k", b"1")])
    assert [r.value for r in everything(reader)] == [b"1"]
    assert reader.ends() == {0: 1}
    with pytest.raises(EventError, match="for reading only"):
        reader.append([("k", b"2")])
    with pytest.raises(EventError, match="for reading only"):
        reader.erase("k")
    reader.close()
    log.close()
    open_log(tmp_path).close()


def test_an_event_that_is_too_large_is_refused_and_nothing_of_its_batch_is_kept(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(EventError, match="larger than the log takes"):
        log.append([("k", b"small"), ("k", bytes(17 << 20))])
    assert everything(log) == []
    log.append([("k", b"next")])
    assert [r.offset for r in everything(log)] == [0]
    log.close()


def test_a_full_disk_refuses_the_event_and_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    log.append([("k", b"before")])
    from plugins.events import partition

    def full(out: Any, data: bytes) -> None:
        out.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(partition, "_write_all", full)
        with pytest.raises(EventError, match="cannot be written: No space left on device"):
            log.append([("k", b"lost")])
    assert log.append([("k", b"after")]) == [(0, 1)]
    assert [r.value for r in everything(log)] == [b"before", b"after"]
    log.close()


def test_after_a_failed_fsync_the_log_takes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path, fsync="always")

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("plugins.events.partition.os.fsync", broken)
        with pytest.raises(EventError, match="fsync failed"):
            log.append([("k", b"unsure")])
    with pytest.raises(EventError, match="closed to writing since an fsync failed"):
        log.append([("k", b"next")])
    log.close()


def test_appends_of_many_threads_share_fsyncs_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path, fsync="always")
    calls = 0
    real = os.fsync

    def slow(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.01)
        real(descriptor)

    monkeypatch.setattr("plugins.events.partition.os.fsync", slow)
    places: list[tuple[int, int]] = []

    def write(worker: int) -> None:
        for n in range(20):
            places.extend(log.append([(f"w{worker}", f"{worker}-{n}".encode())]))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(offset for _, offset in places) == list(range(160))
    assert calls < 120
    by_writer = [r.value.decode().split("-") for r in everything(log)]
    for worker in range(8):
        assert [int(n) for w, n in by_writer if int(w) == worker] == list(range(20))
    log.close()


def test_fsync_at_intervals_happens_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    log = open_log(tmp_path, fsync="interval", interval_ms=10)
    real = os.fsync
    monkeypatch.setattr("plugins.events.partition.os.fsync", lambda fd: (real(fd), synced.set()))
    log.append([("k", b"1")])
    assert synced.wait(5)
    log.close()


def start_writer(folder: Path, fsync: str) -> tuple[int, Any]:
    """A child process that appends without end and says each number when it was answered -> (pid, its words)."""
    words, out = os.pipe()
    child = os.fork()
    if child:
        os.close(out)
        return child, os.fdopen(words)
    try:
        log = open_log(folder, segment_bytes=8192, fsync=fsync)
        n = log.ends()[0]
        while True:
            log.append([("k", b"%d:" % n + b"x" * (n % 700))])
            os.write(out, b"%d\n" % n)
            n += 1
    finally:
        os._exit(1)


@pytest.mark.parametrize("fsync", ["always", "never"])
def test_kill_9_loses_no_event_that_was_answered(tmp_path: Path, fsync: str) -> None:
    for round_ in range(3):
        writer, words = start_writer(tmp_path, fsync)
        heard = [int(words.readline()) for _ in range(60 + 17 * round_)]
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        heard += [int(line) for line in words.read().split("\n")[:-1]]
        words.close()
        log = open_log(tmp_path)
        records = everything(log)
        log.close()
        assert [r.offset for r in records] == list(range(len(records)))
        assert len(records) >= heard[-1] + 1
        assert all(r.value.startswith(b"%d:" % r.offset) for r in records)


def test_the_encoder_refuses_what_the_reader_would_not_take() -> None:
    with pytest.raises(EventError):
        encode(0, b"", bytes(16 << 20))
