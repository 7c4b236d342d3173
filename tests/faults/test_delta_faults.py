"""Deltas under faults: killed publishers, damaged and lost parts, rollbacks in mid-stream, full disks. A scorer ends at
the newest version that is whole, with exactly the rows of its deltas."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.components import ScoreRequest
from engine.errors import BundleError, DeltaGap
from engine.files import sha256, write_whole
from engine.plugins import Plugins
from engine.streaming.deltas.apply import tables
from engine.streaming.deltas.delta import TableRows
from engine.streaming.deltas.delta_codec import encode, read_header
from tests.streaming.chain_world import A, B, RowScorer, World, a_delta, rows_after, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def publisher(world):
    """Bundle A is current, its chain has epoch 1; parts are small, so that a delta has several."""
    publisher = world.publisher(most_bytes=3000)
    publisher.publish_bundle(world.bundles[A], 1, "first")
    return publisher


def at(scorer: RowScorer, version: str) -> None:
    wait_for(lambda: scorer.at == version, f"{version}, it is {scorer.at}")


def local_logs(folder: Path):
    """The streams `deltas` and `models` of a local log, as any process opens them."""
    cls = Plugins().get("event_logs", "local")
    events = cls(cls.Options.model_validate({"path": str(folder / "events"), "read_only": "until-append"}))
    return events.sibling("deltas", partitions=1), events.sibling("models", partitions=1, compact=True)


def unframed(raw: bytes) -> list[bytes]:
    """Pieces, each behind its length."""
    pieces = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        pieces.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return pieces


CHILD = textwrap.dedent(
    """
    import os, signal, struct, sys
    from pathlib import Path
    from engine.errors import LogUnavailable
    from engine.streaming.deltas.publisher import DeltaPublisher
    from engine.streaming.deltas.registry import ModelRegistry
    from tests.faults.test_delta_faults import local_logs
    from tests.streaming.chain_world import A, a_delta

    folder, survives = Path(sys.argv[1]), int(sys.argv[2])
    deltas, models = local_logs(folder)

    class Killed:
        '''Writes part by part, and kills this process when so many are in the log.'''
        down = True
        identity = deltas.identity

        def append(self, events, headers=None):
            if self.down:
                raise LogUnavailable("down")
            for number, event in enumerate(events):
                if number == survives:
                    os.kill(os.getpid(), signal.SIGKILL)
                deltas.append([event])
            os.kill(os.getpid(), signal.SIGKILL)  # all are in the log, nobody was told

    log = Killed()
    publisher = DeltaPublisher(log, models, ModelRegistry(folder / "models"), most_bytes=3000)
    publisher.publish(a_delta(A, 1, 1, rows=500))
    parts = publisher.pending()
    framed = b"".join(struct.pack("<I", len(p)) + p for p in parts)
    (folder / "checkpoint").write_bytes(framed)  # the learner's checkpoint holds what is not acknowledged
    log.down = False
    publisher.flush()
    """
)


@pytest.mark.parametrize("survives", [0, 1, 3, 100])
def test_a_publisher_killed_between_parts_sends_the_same_bytes_again_and_nothing_is_applied_twice(tmp_path, survives):
    deltas, models = local_logs(tmp_path)
    world = World(tmp_path, deltas, models)
    first = world.publisher()
    first.publish_bundle(world.bundles[A], 1)
    first.close()
    for log in (deltas, models):
        log.close()  # the child writes now
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(survives)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr

    kept = unframed((tmp_path / "checkpoint").read_bytes())
    world.deltas, world.models = local_logs(tmp_path)
    there = [r.value for r in world.deltas.read({0: 0}, 100)]
    assert there == kept[:survives]
    again = world.publisher(most_bytes=3000)
    assert again.restore(kept) == 1
    assert not again.publish(a_delta(A, 1, 2, rows=500)).waits
    assert [r.value for r in world.deltas.read({0: 0}, 100)][len(there) : len(there) + len(kept)] == kept
    _, scorer = world.follower(folder=tmp_path / "no files here")
    at(scorer, f"{A}+1.2")
    assert scorer.taken == [f"{A}+1.1", f"{A}+1.2"]
    assert scorer.rows == rows_after(2, rows=500)
    world.close()
    for log in (world.deltas, world.models):
        log.close()


def test_a_damaged_part_is_named_and_the_file_stands_in(world, publisher):
    follower, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1, rows=500))
    at(scorer, f"{A}+1.1")
    delta = a_delta(A, 1, 2, rows=500)
    parts = encode(delta, "float32", 3000)
    publisher.files.write(delta, parts)
    broken = parts[1][:-1] + bytes([parts[1][-1] ^ 1])
    world.deltas.append([("films", part) for part in [parts[0], broken, *parts[2:]]])
    at(scorer, f"{A}+1.2")
    assert scorer.rows == rows_after(2, rows=500)
    assert follower.status().last_error == f"films {A}+1.2: part 2 of {len(parts)} is damaged"


def test_a_damaged_part_without_files_keeps_the_last_whole_version_until_it_is_sent_again(world, publisher):
    follower, scorer = world.follower(folder=world.folder / "no files here")
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    parts = encode(a_delta(A, 1, 2, rows=500), "float32", 3000)
    broken = parts[1][:50] + b"?" + parts[1][51:]
    world.deltas.append([("films", part) for part in [parts[0], broken, *parts[2:]]])
    wait_for(lambda: follower.status().errors >= 1, "an error")
    assert scorer.at == f"{A}+1.1"
    assert scorer.rows == rows_after(1)
    world.deltas.append([("films", part) for part in parts])
    at(scorer, f"{A}+1.2")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_lost_doubled_or_out_of_order_the_rows_end_as_they_should(world, publisher, seed):
    """Records of 30 deltas: a tenth lost, a tenth damaged, a third twice, neighbours swapped; the files are whole."""
    chance = random.Random(seed)
    sizes = [chance.choice([4, 300]) for _ in range(30)]
    for sequence, rows in enumerate(sizes, 1):
        publisher.publish(a_delta(A, 1, sequence, rows=rows))
    expected: dict[int, float] = {}
    for sequence, rows in enumerate(sizes, 1):
        expected |= {0: float(sequence)} | {n + 1000 * sequence: float(sequence) for n in range(1, rows)}
    sent = []
    for record in world.deltas.records:
        luck = chance.random()
        value = record.value
        if luck < 0.1:
            continue
        if luck < 0.2:
            place = chance.randrange(len(value))
            value = value[:place] + bytes([value[place] ^ 0x55]) + value[place + 1 :]
        sent += [value] * (2 if luck > 0.67 else 1)
    for place in range(0, len(sent) - 1, 2):
        if chance.random() < 0.5:
            sent[place : place + 2] = reversed(sent[place : place + 2])
    world.deltas.trim(0, world.deltas.ends()[0])
    world.deltas.append([("films", value) for value in sent])
    follower, scorer = world.follower()
    at(scorer, f"{A}+1.30")
    assert scorer.rows == expected
    wait_for(lambda: follower.status().trouble is None, "no trouble")


def test_a_rollback_while_deltas_arrive_is_followed_and_no_delta_of_the_left_chain_comes_after(world, publisher):
    publisher.publish_bundle(world.bundles[B], 2, "second")
    follower, scorer = world.follower()
    at(scorer, B)
    stop = threading.Event()
    told: list[str] = []

    def learn() -> None:
        base, epoch, sequence = B, 2, 0
        while not stop.is_set():
            sequence += 1
            try:
                publisher.publish(a_delta(base, epoch, sequence))
            except DeltaGap as gap:
                told.append(str(gap))
                base, epoch, sequence = world.registry.current().version, world.registry.new_epoch(), 0
            time.sleep(0.002)

    learner = threading.Thread(target=learn)
    learner.start()
    wait_for(lambda: len(scorer.taken) >= 20, "twenty deltas")
    world.registry.rollback(reason="worse")
    wait_for(lambda: (scorer.at or "").startswith(f"{A}+"), "deltas on top of the version gone back to")
    wait_for(lambda: len([v for v in scorer.taken if v.startswith(A)]) >= 20, "twenty more")
    stop.set()
    learner.join()
    assert len(told) == 1
    assert "worse" in told[0]
    first_new = next(n for n, v in enumerate(scorer.taken) if v.startswith(A))
    assert all(v.startswith(f"{B}+2.") for v in scorer.taken[:first_new])
    assert [v for v in scorer.taken[first_new:] if not v.startswith(f"{A}+4.")] == []
    last = follower.status().sequence
    at(scorer, f"{A}+4.{max(last, scorer_end(world))}")
    assert scorer.rows == rows_after(follower.status().sequence)


def scorer_end(world) -> int:
    """The newest sequence of epoch 4 in the log."""
    headers = [read_header(r.value) for r in world.deltas.records]
    return max(h.sequence for h in headers if h.epoch == 4)


def test_a_bundle_that_is_missing_is_waited_for_while_the_old_one_serves(world, publisher, tmp_path):
    follower, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    world.registry.publish(world.bundles[B], 2, "second")
    at(scorer, B)
    (world.registry.folder / A).rename(tmp_path / "away")
    missing = msgspec.structs.replace(
        world.registry.current(),
        version=A,
        path=f"films/{A}",
        epoch=3,
        sha256=sha256(tmp_path / "away" / "manifest.json"),
    )
    write_whole(world.registry.folder / "current.json", missing.encoded())
    wait_for(lambda: f"no version {A}" in (follower.status().trouble or ""), "trouble")
    assert scorer.at == B  # it goes on serving
    world.deltas.append([("films", part) for part in encode(a_delta(B, 2, 1), "float32")])
    time.sleep(0.3)
    assert scorer.at == B  # but that chain was left
    shutil.move(tmp_path / "away", world.registry.folder / A)
    at(scorer, A)
    wait_for(lambda: follower.status().trouble is None, "no trouble")


def test_a_full_disk_leaves_the_old_pointer_and_deltas_go_on(world, publisher, monkeypatch):
    """A limit on the length of files stands for the disk."""
    _, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    before = (world.registry.folder / "current.json").read_bytes()

    def no_links(*arguments, **options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("engine.files.os.link", no_links)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        with pytest.raises(BundleError, match="cannot be written"):
            publisher.publish_bundle(world.bundles[B], 1)
        assert not publisher.publish(a_delta(A, 1, 2)).waits  # no file of it, but the log has it
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (world.registry.folder / "current.json").read_bytes() == before
    assert not (world.registry.folder / B).exists()
    at(scorer, f"{A}+1.2")
    publisher.publish_bundle(world.bundles[B], 1)
    at(scorer, B)


def test_two_learners_of_one_model_in_two_processes_the_second_is_refused(world):
    world.registry.publish(world.bundles[A], 1, "first")
    script = (
        "import sys, time; from pathlib import Path; from engine.streaming.deltas.publisher import DeltaPublisher\n"
        "from engine.streaming.deltas.registry import ModelRegistry\n"
        "from tests.streaming.memory_log import MemoryLog\n"
        "p = DeltaPublisher(MemoryLog(), MemoryLog(), ModelRegistry(Path(sys.argv[1])))\n"
        "print('publishes', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(world.registry.root)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "publishes\n"
    with pytest.raises(BundleError, match=f"process {child.pid} on .* publishes this model already"):
        world.publisher()
    child.kill()
    child.wait()
    world.publisher().publish(a_delta(A, 1, 1))


def test_a_log_that_answers_with_an_error_after_writing_makes_duplicates_that_change_nothing(world, publisher):
    """All parts are in the log, but nobody said so: they are sent again."""
    append = world.deltas.append
    world.deltas.append = lambda events, headers=None: (append(events), world.deltas.down(), append([]))[0]
    assert publisher.publish(a_delta(A, 1, 1, rows=500)).waits
    world.deltas.append = append
    world.deltas.down(False)
    assert publisher.flush()
    follower, scorer = world.follower(folder=world.folder / "no files here")
    publisher.publish(a_delta(A, 1, 2))
    at(scorer, f"{A}+1.2")
    assert scorer.taken == [f"{A}+1.1", f"{A}+1.2"]
    assert follower.status().known == 1


def test_hostile_bytes_in_the_stream_are_counted_and_passed_over(world, publisher):
    follower, scorer = world.follower()
    for value in (b"x", b"PXD1" + b"\0" * 100, b"PXD1" + bytes(32) + b"\xff\xff\xff\xff" + b"{}", b"{" * 5000):
        world.deltas.append([("films", value)])
    world.models.append([("films", b"[" * 5000), ("films", b'{"model": "../../etc"}')])
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    assert follower.status().errors >= 4


def test_a_real_scorers_scores_follow_the_deltas(tiny_bundle, tmp_path):
    """The scorer of this process and a trained bundle: a table set to zeros is seen in the scores, and gone again."""
    cls = Plugins().get("scorers", "inproc")
    scorer = cls(cls.Options())
    scorer.load(tiny_bundle)
    base = scorer.version
    model = scorer._loaded.model
    name = next(n for n, w in tables(model).items() if len(w) > 5)
    weight = tables(model)[name]
    request = ScoreRequest(user={}, history={}, items=[str(n) for n in range(10)])
    task = next(iter(scorer.score(request).tasks))
    before = scorer.score(request).tasks[task].copy()
    world = World(tmp_path)
    try:
        publisher = world.publisher()
        publisher.publish_bundle(tiny_bundle, 1)
        follower, _ = world.follower(scorer)
        rows = np.arange(len(weight), dtype=np.int64)
        table = TableRows(rows, np.zeros((len(rows), weight.shape[1]), np.float32))
        publisher.publish(a_delta(base, 1, 1, model="tiny", tables={name: table}))
        wait_for(lambda: scorer.version == f"{base}+1.1", "the delta")
        assert follower.status().swaps == 0
        assert scorer.score(request).version == f"{base}+1.1"
        assert not np.array_equal(scorer.score(request).tasks[task], before)
        world.registry.promote(base)  # back to the bundle itself
        wait_for(lambda: scorer.version == base, "the bundle")
        np.testing.assert_array_equal(scorer.score(request).tasks[task], before)
    finally:
        world.close()
