"""A follower brings a scorer to the newest version, whatever is missing on the way, and never takes it down."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from engine.errors import BundleError, DeltaGap
from engine.files import write_whole
from engine.streaming.deltas.delta_codec import encode, read_header
from engine.streaming.deltas.follower import DeltaFollower
from engine.streaming.deltas.registry import ModelRegistry
from tests.streaming.chain_world import A, B, C, RowScorer, a_delta, rows_after, wait_for


def at(scorer: RowScorer, version: str) -> None:
    wait_for(lambda: scorer.at == version, f"{version}, it is {scorer.at}")


def test_a_scorer_without_a_bundle_gets_the_pointers_and_the_deltas_behind_it(world, publisher):
    for sequence in (1, 2, 3):
        publisher.publish(a_delta(A, 1, sequence))
    _, scorer = world.follower()
    at(scorer, f"{A}+1.3")
    assert scorer.loaded == [A]
    assert scorer.rows == rows_after(3)


def test_a_scorer_that_has_the_bundle_does_not_load_it_again(world, publisher):
    scorer = RowScorer()
    scorer.load(world.bundles[A])
    world.follower(scorer)
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    assert scorer.loaded == [A]


def test_deltas_are_followed_as_they_come_and_told(world, publisher):
    told = []
    follower, scorer = world.follower(on_applied=told.append)
    for sequence in range(1, 21):
        publisher.publish(a_delta(A, 1, sequence))
    at(scorer, f"{A}+1.20")
    wait_for(lambda: len(told) == 20, "twenty callbacks")
    assert [one.version for one in told] == [f"{A}+1.{n}" for n in range(1, 21)]
    assert all(one.bytes > 0 and one.rows == 4 and one.seconds >= 0 for one in told)
    assert told[4].newest == 1_700_000_005.0
    status = follower.status()
    assert (status.model, status.version, status.epoch, status.sequence) == ("films", f"{A}+1.20", 1, 20)
    assert (status.applied, status.gaps, status.errors, status.trouble) == (20, 0, 0, None)


def test_a_new_bundle_is_swapped_in_by_the_servers_own_load_and_its_chain_followed(world, publisher):
    scorer = RowScorer()
    swapped = []

    def load(path):
        swapped.append(path)
        scorer.load(path)

    world.follower(scorer, on_swap=load)
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    publisher.publish_bundle(world.bundles[B], 1)
    publisher.publish(a_delta(B, 1, 1))
    at(scorer, f"{B}+1.1")
    assert swapped == [world.registry.bundle(A), world.registry.bundle(B)]


def test_deltas_of_a_newer_bundle_wait_for_its_pointer_and_none_is_missed(world, publisher):
    """The learner of another process was quicker than the look at the registry."""
    _, scorer = world.follower()
    at(scorer, A)
    epoch = 5
    publisher.publish_bundle(world.bundles[B], epoch)
    for sequence in (1, 2, 3):
        publisher.publish(a_delta(B, epoch, sequence))
    at(scorer, f"{B}+5.3")
    assert scorer.rows == rows_after(3)


def test_a_rollback_by_hand_is_followed_and_the_left_chains_deltas_are_ignored(world, publisher):
    publisher.publish_bundle(world.bundles[B], 2)
    follower, scorer = world.follower()
    publisher.publish(a_delta(B, 2, 1))
    at(scorer, f"{B}+2.1")
    world.registry.rollback(reason="by hand")
    at(scorer, A)
    world.deltas.append([("films", part) for part in encode(a_delta(B, 2, 2), "float32")])  # it had not heard of it
    world.deltas.append(
        [("films", part) for part in encode(a_delta(A, 1, 1), "float32")]
    )  # A's first chain, left long ago
    wait_for(lambda: follower.status().stale >= 2, "two stale deltas")
    assert scorer.at == A
    assert scorer.rows == {}


def test_a_chain_begun_anew_from_the_same_bundle_starts_from_the_bundle(world, publisher):
    _, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    publisher.publish(a_delta(A, 1, 2))
    at(scorer, f"{A}+1.2")
    epoch = world.registry.new_epoch()
    publisher.publish(a_delta(A, epoch, 1))
    at(scorer, f"{A}+{epoch}.1")
    assert scorer.loaded == [A, A]
    assert scorer.rows == rows_after(1)


def test_a_pinned_version_is_served_as_it_is_and_after_it_the_chain_is_caught_up(world, publisher):
    _, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    pinned = world.registry.pin()
    at(scorer, A)
    new = world.registry.new_epoch()
    assert publisher.publish(a_delta(A, new, 1)).waits
    # one that does not respect the pin
    world.deltas.append([("films", part) for part in encode(a_delta(A, new, 1), "float32")])
    time.sleep(0.3)
    assert scorer.at == A
    world.registry.unpin()
    assert pinned.epoch < new
    at(scorer, f"{A}+{new}.1")


def test_a_lost_record_is_found_in_the_files(world, publisher):
    for sequence in range(1, 6):
        publisher.publish(a_delta(A, 1, sequence))
    world.deltas.drop(0, 2)  # the third delta
    _, scorer = world.follower()
    at(scorer, f"{A}+1.5")
    assert scorer.rows == rows_after(5)


def test_a_gap_that_nothing_closes_keeps_the_last_whole_version_until_a_new_bundle(world, publisher):
    follower, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    for sequence in (3, 4):  # the second is nowhere
        world.deltas.append([("films", part) for part in encode(a_delta(A, 1, sequence), "float32")])
    wait_for(lambda: follower.status().gaps >= 1 and follower.status().trouble is not None, "a gap, counted and said")
    assert scorer.at == f"{A}+1.1"
    assert "does not follow" in follower.status().trouble
    assert scorer.rows == rows_after(1)
    publisher.publish_bundle(world.bundles[B], 1)
    publisher.publish(a_delta(B, 1, 1))
    at(scorer, f"{B}+1.1")
    assert follower.status().trouble is None


def test_a_gap_is_closed_when_the_missing_delta_comes_late(world, publisher):
    follower, scorer = world.follower()
    for sequence in (1, 3, 2):
        world.deltas.append([("films", part) for part in encode(a_delta(A, 1, sequence), "float32")])
    at(scorer, f"{A}+1.3")
    assert scorer.rows == rows_after(3)
    assert follower.status().gaps >= 1


def test_a_scorer_that_refuses_what_follows_gets_the_bundle_and_the_chain_anew(world, publisher):
    scorer = RowScorer()
    refused = []

    def refuse_once(delta):
        if delta.sequence == 3 and not refused:
            refused.append(delta.version)
            raise DeltaGap("its tables are not what they were")

    scorer.refuse = refuse_once
    follower, _ = world.follower(scorer)
    for sequence in range(1, 5):
        publisher.publish(a_delta(A, 1, sequence))
    at(scorer, f"{A}+1.4")
    assert scorer.loaded == [A, A]
    assert scorer.rows == rows_after(4)
    assert follower.status().gaps == 1


def test_a_delta_that_never_fits_does_not_keep_the_follower_loading(world, publisher, monkeypatch):
    monkeypatch.setattr("engine.streaming.deltas.follower.SHORTEST_RETRY", 1000.0)
    scorer = RowScorer()

    def refuse(delta):
        if delta.sequence == 3:
            raise DeltaGap("never")

    scorer.refuse = refuse
    follower, _ = world.follower(scorer)
    for sequence in range(1, 40):
        publisher.publish(a_delta(A, 1, sequence))
    wait_for(lambda: follower.status().gaps >= 1 and scorer.at == f"{A}+1.2", "a gap behind the second")
    time.sleep(0.3)
    assert scorer.loaded == [A, A]
    publisher.publish_bundle(world.bundles[C], 1)
    at(scorer, C)


def test_a_scorer_that_fails_in_an_unexpected_way_does_not_end_the_follower(world, publisher):
    scorer = RowScorer()
    failed = []

    def fail_once(delta):
        if not failed:
            failed.append(delta.version)
            raise ZeroDivisionError("a bug")

    scorer.refuse = fail_once
    follower, _ = world.follower(scorer)
    for sequence in (1, 2):
        publisher.publish(a_delta(A, 1, sequence))
    at(scorer, f"{A}+1.2")
    assert follower.status().errors >= 1


def test_a_callback_that_fails_is_counted_and_nothing_else(world, publisher):
    def callback(applied):
        raise ValueError("a bug in a metric")

    follower, scorer = world.follower(on_applied=callback)
    publisher.publish(a_delta(A, 1, 1))
    publisher.publish(a_delta(A, 1, 2))
    at(scorer, f"{A}+1.2")
    assert (follower.status().applied, follower.status().errors) == (2, 2)


def test_while_the_log_is_down_the_files_and_the_registry_are_followed(world, publisher):
    follower, scorer = world.follower()
    at(scorer, A)
    world.deltas.down()
    assert publisher.publish(a_delta(A, 1, 1)).waits
    at(scorer, f"{A}+1.1")  # by its file
    wait_for(lambda: follower.status().trouble is not None, "trouble")
    assert "down" in follower.status().trouble
    world.registry.promote(A)
    at(scorer, A)
    world.deltas.down(False)
    wait_for(lambda: follower.status().trouble is None, "no trouble")


def test_a_follower_may_start_before_log_and_registry(world):
    world.deltas.down()
    _, scorer = world.follower()
    time.sleep(0.3)
    assert scorer.at is None
    world.deltas.down(False)
    publisher = world.publisher()
    publisher.publish_bundle(world.bundles[A], 1)
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")


def test_a_log_that_was_cut_or_begun_anew_is_read_from_its_beginning(world, publisher):
    for sequence in range(1, 6):
        publisher.publish(a_delta(A, 1, sequence))
    world.deltas.trim(0, 4)  # deltas 1..4 are gone, the pointer says 0
    follower, scorer = world.follower()
    at(scorer, f"{A}+1.5")
    assert follower.status().applied == 5


def test_deltas_of_another_model_are_passed_over(world, publisher):
    follower, scorer = world.follower()
    other = a_delta(A, 1, 1, model="books")
    world.deltas.append([("books", part) for part in encode(other, "float32")])
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    assert follower.status().applied == 1


def test_a_scorer_that_someone_loaded_something_else_into_is_brought_back(world, publisher):
    _, scorer = world.follower()
    publisher.publish(a_delta(A, 1, 1))
    at(scorer, f"{A}+1.1")
    scorer.load(world.bundles[C])
    at(scorer, f"{A}+1.1")
    assert scorer.rows == rows_after(1)


def test_without_a_pointer_file_the_stream_of_pointers_is_followed(world, publisher, tmp_path):
    """A replica to which the versions were copied, and nothing else."""
    copied = tmp_path / "elsewhere"
    shutil.copytree(world.registry.bundle(A), copied / "films" / A)
    publisher.publish(a_delta(A, 1, 1))
    scorer = RowScorer()
    follower = DeltaFollower(world.deltas, world.models, ModelRegistry(copied), scorer)
    world.followers.append(follower)
    follower.start()
    at(scorer, f"{A}+1.1")


def test_a_version_that_is_not_the_one_that_was_published_is_not_loaded(world, publisher):
    follower, scorer = world.follower()
    at(scorer, A)
    world.registry.publish(world.bundles[B], 2, "published")
    at(scorer, B)
    world.registry.rollback()
    at(scorer, A)
    pointer = world.registry.folder / "current.json"
    raw = json.loads(pointer.read_text())
    write_whole(pointer, json.dumps(raw | {"version": B, "path": f"films/{B}", "epoch": raw["epoch"] + 1}).encode())
    wait_for(lambda: "copy the bundle again" in (follower.status().trouble or ""), "a refusal")
    assert scorer.at == A


def test_every_part_in_the_log_is_within_the_limit(world):
    publisher = world.publisher(most_bytes=3000)
    publisher.publish_bundle(world.bundles[A], 1)
    publisher.publish(a_delta(A, 1, 1, rows=500))
    assert len(world.deltas.records) > 3
    assert all(len(r.value) <= 3000 and read_header(r.value).sequence == 1 for r in world.deltas.records)
    _, scorer = world.follower()
    at(scorer, f"{A}+1.1")
    assert scorer.rows == rows_after(1, rows=500)


def test_a_publisher_of_a_broken_delta_is_told(world, publisher):
    broken = a_delta(A, 1, 1)
    broken.tables["item"].values[0, 0] = float("nan")
    with pytest.raises(BundleError, match="not finite"):
        publisher.publish(broken)
    publisher.publish(a_delta(A, 1, 1))
    _, scorer = world.follower()
    at(scorer, f"{A}+1.1")
