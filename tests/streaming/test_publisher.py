"""A learner's way out: nothing is lost while the log is away, and a chain that was left is not gone on with."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest

from engine.errors import BundleError, DeltaGap, LogUnavailable
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta_codec import encode, read_header
from engine.streaming.deltas.delta_files import DeltaFiles
from engine.streaming.deltas.pointer import decode_pointer
from engine.streaming.deltas.publisher import HANGS_SECONDS
from tests.streaming.chain_world import A, B, C, a_delta, rows_after, wait_for


def sequences(world) -> list[int]:
    return [read_header(record.value).sequence for record in world.deltas.records]


def test_a_delta_is_in_the_log_under_the_models_name_and_in_a_file(world, publisher):
    published = publisher.publish(a_delta(A, 1, 1))
    (record,) = world.deltas.records
    assert record.key == "films"
    assert (published.version, published.rows, published.bytes) == (f"{A}+1.1", 4, len(record.value))
    assert not published.waits
    (file,) = DeltaFiles(world.registry.folder / "deltas").of(A, 1)
    assert file.read()[0].version == f"{A}+1.1"


def test_a_bundle_makes_a_pointer_record_with_the_position_from_which_its_chain_goes_on(world, publisher):
    for sequence in (1, 2, 3):
        publisher.publish(a_delta(A, 1, sequence))
    pointer = publisher.publish_bundle(world.bundles[B], 1, "learned")
    assert pointer.positions == {0: 3}
    assert pointer.stream == world.deltas.identity
    records = world.models.records
    assert [decode_pointer(r.value, "models").version for r in records] == [A, B]
    assert {r.key for r in records} == {"films"}
    assert decode_pointer(records[-1].value, "models") == world.registry.current()


def test_files_of_older_chains_go_with_a_new_bundle(world, publisher):
    publisher.publish(a_delta(A, 1, 1))
    publisher.publish_bundle(world.bundles[B], 1)
    publisher.publish(a_delta(B, 1, 1))
    assert [p.name for p in (world.registry.folder / "deltas").iterdir()] == [f"{B}+1.1.delta"]


# ------------------------------------------------------------------------------------------------ the outbox
def test_while_the_log_is_down_deltas_wait_as_one_and_arrive_when_it_is_back(world, publisher):
    _, scorer = world.follower(folder=world.folder / "no files here")
    publisher.publish(a_delta(A, 1, 1))
    world.deltas.down()
    for sequence in range(2, 101):
        published = publisher.publish(a_delta(A, 1, sequence))
        assert published.waits
        assert published.bytes == 0
        assert publisher.waiting <= 2  # the one whose bytes are fixed, and all that came after it
    assert "down" in publisher.trouble
    world.deltas.down(False)
    assert publisher.flush()
    assert sequences(world) == [1, 2, 100]
    assert publisher.trouble is None
    wait_for(lambda: scorer.at == f"{A}+1.100", "all deltas")
    assert scorer.rows == rows_after(100)  # of a row in several, the latest value
    publisher.publish(a_delta(A, 1, 101))
    wait_for(lambda: scorer.at == f"{A}+1.101", "the next")


def test_a_log_that_hangs_holds_up_one_call_and_gets_all_in_order_when_it_goes_on(world, publisher, monkeypatch):
    publisher.publish(a_delta(A, 1, 1))
    append, answers = world.deltas.append, threading.Event()
    asked = threading.Semaphore(0)

    def hang(events, headers=None):
        asked.release()
        if not answers.wait(HANGS_SECONDS):
            raise LogUnavailable("no answer in time")
        return append(events, headers)

    monkeypatch.setattr(world.deltas, "append", hang)
    assert publisher.publish(a_delta(A, 1, 2)).waits  # as long as the log's timeout
    assert asked.acquire(blocking=False)
    monkeypatch.setattr(publisher.deltas, "append", lambda events, headers=None: answers.wait() and append(events))
    for sequence in range(3, 100):
        assert publisher.publish(a_delta(A, 1, sequence)).waits  # returns, though the log does not answer at all
    assert publisher.waiting == 2
    assert not publisher.flush()
    assert sequences(world) == [1]
    answers.set()
    wait_for(publisher.flush, "all is sent")
    assert sequences(world) == [1, 2, 99]
    assert publisher.trouble is None
    publisher.publish(a_delta(A, 1, 100))
    assert sequences(world) == [1, 2, 99, 100]


def test_what_waits_at_the_end_follows_if_the_log_answers_in_time(world, publisher):
    publisher.publish(a_delta(A, 1, 1))
    world.deltas.down()
    publisher.publish(a_delta(A, 1, 2))
    assert not publisher.drain(0.0)
    back = threading.Timer(0.3, world.deltas.down, (False,))
    back.start()
    assert publisher.drain(60.0)
    assert sequences(world) == [1, 2]
    publisher.publish(a_delta(A, world.registry.pin(reason="by hand").epoch, 1))
    assert not publisher.drain(60.0), "a pinned version keeps it back, and nobody waits for that"
    assert publisher.waiting == 1


def test_the_outbox_is_bounded_by_the_rows_not_by_the_time(world, publisher):
    world.deltas.down()
    sizes = []
    for sequence in range(1, 60):
        delta = a_delta(A, 1, sequence)
        delta.tables["item"].rows[:] = np.arange(4)  # the same rows again and again
        publisher.publish(delta)
        sizes.append(sum(map(len, publisher.pending())))
    assert sizes[-1] < sizes[2] + 50  # the header's numbers grow by some digits


def test_after_a_crash_the_same_bytes_are_sent_again(world, publisher, tmp_path):
    world.deltas.down()
    for sequence in (1, 2, 3):
        publisher.publish(a_delta(A, 1, sequence))
    kept = publisher.pending()
    publisher.close()  # what a kill does to a lease

    again = world.publisher()
    assert again.restore(kept) == 2
    assert again.pending() == kept
    world.deltas.down(False)
    published = again.publish(a_delta(A, 1, 4))
    assert not published.waits
    assert [r.value for r in world.deltas.records][: len(kept)] == kept
    assert sequences(world) == [1, 3, 4]


def test_a_restored_outbox_of_a_chain_that_was_left_is_dropped(world, publisher):
    world.deltas.down()
    publisher.publish(a_delta(A, 1, 1))
    kept = publisher.pending()
    publisher.close()
    world.registry.promote(A)
    again = world.publisher()
    assert again.restore(kept) == 0
    assert again.waiting == 0


def test_damaged_bytes_in_a_checkpoint_are_refused(world, publisher):
    world.deltas.down()
    publisher.publish(a_delta(A, 1, 1))
    (part,) = publisher.pending()
    with pytest.raises(BundleError, match="damaged"):
        publisher.restore([part[:-1] + bytes([part[-1] ^ 1])])


def test_a_new_bundle_takes_the_place_of_what_waits(world, publisher):
    world.deltas.down()
    publisher.publish(a_delta(A, 1, 1))
    pointer = publisher.publish_bundle(world.bundles[B], 1)
    assert publisher.waiting == 0
    assert pointer.positions == {}  # the log could not say where it ends
    publisher.publish(a_delta(B, 1, 1))
    world.deltas.down(False)
    assert publisher.flush()
    assert sequences(world) == [1]
    assert world.models.records[-1].key == "films"  # the pointer went out with it
    _, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{B}+1.1", "the new chain")


def test_a_pinned_version_makes_deltas_wait(world, publisher):
    world.registry.pin()
    epoch = world.registry.new_epoch()
    for sequence in (1, 2):
        assert publisher.publish(a_delta(A, epoch, sequence)).waits
    with pytest.raises(BundleError, match="pinned"):
        publisher.publish_bundle(world.bundles[B], epoch)
    assert publisher.waiting == 1
    world.registry.unpin()
    assert publisher.flush()
    assert sequences(world) == [2]


# ------------------------------------------------------------------------------------------------ chains
def test_a_chain_that_was_left_is_refused_and_says_where_to_begin(world, publisher):
    publisher.publish(a_delta(A, 1, 1))
    world.registry.promote(A, reason="tried by hand")
    with pytest.raises(DeltaGap, match=r"current since epoch 2 \(tried by hand\): begin anew"):
        publisher.publish(a_delta(A, 1, 2))
    assert publisher.waiting == 0
    publisher.publish(a_delta(A, world.registry.new_epoch(), 1))
    assert sequences(world) == [1, 1]


def test_a_pointer_that_another_process_set_is_told_to_the_stream(world, publisher):
    world.registry.promote(A)
    assert publisher.flush()
    assert decode_pointer(world.models.records[-1].value, "models").reason == "promoted"


def test_a_delta_of_a_bundle_that_is_not_current_is_refused(world, publisher):
    with pytest.raises(DeltaGap, match="films aaaaaaaaaaaa is current"):
        publisher.publish(a_delta(C, 3, 1))


def test_without_a_bundle_there_is_nothing_to_follow(world):
    publisher = world.publisher()
    with pytest.raises(BundleError, match="holds no model yet"):
        publisher.publish(a_delta(A, 1, 1))


def test_a_delta_that_does_not_follow_the_one_before_is_refused(world, publisher):
    publisher.publish(a_delta(A, 1, 1))
    for sequence in (1, 3):
        with pytest.raises(DeltaGap, match="does not follow"):
            publisher.publish(a_delta(A, 1, sequence))
    publisher.publish(a_delta(A, 1, 2))


def test_a_learner_that_comes_back_is_told_how_far_its_chain_has_gone(world, publisher):
    assert publisher.reached(A, 1) == 0
    for sequence in range(1, 6):
        publisher.publish(a_delta(A, 1, sequence))
    publisher.close()
    again = world.publisher()
    assert (again.reached(A, 1), again.reached(A, 2), again.reached(B, 1)) == (5, 0, 0)
    world.deltas.down()
    assert again.reached(A, 1) == 5  # by the files
    world.deltas.down(False)
    shutil.rmtree(world.registry.folder / "deltas")
    assert again.reached(A, 1) == 5  # by the log


# ------------------------------------------------------------------------------------------------ two at once
def test_the_second_of_two_publishers_is_refused(world, publisher):
    with pytest.raises(BundleError, match=f"process {os.getpid()} on .* publishes this model already"):
        world.publisher()
    publisher.close()
    world.publisher().publish(a_delta(A, 1, 1))


# ------------------------------------------------------------------------------------------------ files
def test_many_files_become_few_and_hold_the_same_rows(tmp_path):
    files = DeltaFiles(tmp_path, most_files=8)
    for sequence in range(1, 51):
        delta = a_delta(A, 1, sequence)
        files.write(delta, encode(delta, "float32"))
        if files.many(A, 1):
            files.shrink(A, 1)
    assert len(list(tmp_path.iterdir())) <= 8
    rows: dict[int, float] = {}
    at = 0
    for delta, size in files.after(A, 1, 0):
        assert delta.after <= at
        assert size > 0
        rows |= dict(zip(delta.tables["item"].rows.tolist(), delta.tables["item"].values[:, 0].tolist(), strict=True))
        at = delta.sequence
    assert at == files.newest(A, 1) == 50
    assert rows == rows_after(50)


def test_a_replica_in_the_middle_of_a_merged_file_catches_up(world, publisher):
    publisher.publish(a_delta(A, 1, 1))
    _, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{A}+1.1", "the first")
    files = DeltaFiles(world.registry.folder / "deltas")
    for sequence in range(2, 12):
        delta = a_delta(A, 1, sequence)
        files.write(delta, encode(delta, "float32"))
    files.shrink(A, 1)
    publisher.close()
    world.deltas.append([("films", part) for part in encode(a_delta(A, 1, 12), "float32")])
    wait_for(lambda: scorer.at == f"{A}+1.12", "the twelfth")
    assert scorer.rows == rows_after(12)


def test_a_truncated_file_ends_the_catching_up_with_its_name(tmp_path):
    files = DeltaFiles(tmp_path)
    for sequence in (1, 2):
        delta = a_delta(A, 1, sequence)
        files.write(delta, encode(delta, "float32"))
    os.truncate(tmp_path / f"{A}+1.2.delta", 100)
    found = files.after(A, 1, 0)
    assert next(found)[0].sequence == 1
    with pytest.raises(BundleError, match=r"1\.2\.delta: truncated"):
        next(found)


def test_a_file_that_holds_another_delta_than_its_name_says_is_refused(tmp_path):
    files = DeltaFiles(tmp_path)
    delta = a_delta(A, 1, 1)
    files.write(delta, encode(delta, "float32"))
    (tmp_path / f"{A}+1.1.delta").rename(tmp_path / f"{A}+1.2.delta")
    (file,) = files.of(A, 1)
    with pytest.raises(BundleError, match=r"holds a+\+1\.1"):
        file.read()


def test_a_full_disk_for_files_does_not_keep_deltas_from_the_log(world, publisher, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.streaming.deltas.delta_files.write_whole", full)
    assert not publisher.publish(a_delta(A, 1, 1)).waits
    assert sequences(world) == [1]


def test_int8_takes_fewer_bytes(world):
    publisher = world.publisher(dtype="int8")
    publisher.publish_bundle(world.bundles[A], 1)
    exact = sum(map(len, encode(a_delta(A, 1, 1, rows=2000), "float32")))
    # a row of four: 8 bytes id + 16 bytes as float32, 8 + 4 + 4 as int8
    assert publisher.publish(a_delta(A, 1, 1, rows=2000)).bytes < 0.7 * exact
    assembler = Assembler()
    (delta,) = [d for r in world.deltas.records if (d := assembler.add(r.value)) is not None]
    np.testing.assert_allclose(delta.tables["item"].values, 1.0, atol=1 / 254)
