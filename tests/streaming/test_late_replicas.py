"""A bundle and the files beside it are the whole chain: who starts late, or missed a record, always catches up."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engine.config_learning import PublishConfig
from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta, TableRows
from engine.streaming.deltas.delta_codec import encode
from engine.streaming.deltas.delta_files import MOST_FILES, DeltaFiles
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.learning.chain import Chain
from tests.streaming.chain_world import A, B, World, a_delta, rows_after, wait_for

ROWS, TOUCHED, DELTAS = 500, 4, 10_000


def shrunk(publisher: DeltaPublisher) -> None:
    if publisher._shrinking is not None:
        publisher._shrinking.join(60)


def test_a_replica_that_starts_after_ten_thousand_deltas_has_them_all_from_few_files(
    world: World, publisher: DeltaPublisher
) -> None:
    """The log has forgotten all of them. The model has 500 rows, so the files may hold each of them but a few times."""
    random = np.random.default_rng(7)
    expected: dict[int, float] = {}
    largest = 0
    for sequence in range(1, DELTAS + 1):
        rows = np.sort(random.choice(ROWS, TOUCHED, replace=False))
        tables = {"item": TableRows(rows, np.full((TOUCHED, 4), sequence, np.float32))}
        size = publisher.publish(a_delta(A, 1, sequence, tables=tables)).bytes
        largest = max(largest, size)
        expected |= dict.fromkeys(rows.tolist(), float(sequence))
        if sequence % 500 == 0:
            shrunk(publisher)
    world.deltas.trim(0, world.deltas.ends()[0])  # type: ignore[attr-defined]
    folder = world.registry.folder / "deltas"
    assert len(list(folder.iterdir())) < 2 * MOST_FILES + 500
    whole = sum(map(len, encode(a_delta(A, 1, 1, rows=ROWS), "float32")))
    assert sum(p.stat().st_size for p in folder.iterdir()) < whole + (2 * MOST_FILES + 500) * (largest + 4)

    follower, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{A}+1.{DELTAS}", f"all of them, it is at {scorer.at}")
    assert scorer.rows == expected
    assert scorer.loaded == [A]
    publisher.publish(a_delta(A, 1, DELTAS + 1))
    wait_for(lambda: scorer.at == f"{A}+1.{DELTAS + 1}", "the next one, from the log")
    assert follower.status().trouble is None


def test_a_replica_that_missed_what_the_log_forgot_catches_up_from_the_files(
    world: World, publisher: DeltaPublisher
) -> None:
    publisher.publish(a_delta(A, 1, 1))
    follower, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{A}+1.1", "the first")
    follower.stop()
    for sequence in range(2, 301):
        publisher.publish(a_delta(A, 1, sequence))
    shrunk(publisher)
    world.deltas.trim(0, world.deltas.ends()[0] - 1)  # type: ignore[attr-defined]
    world.follower(scorer)
    wait_for(lambda: scorer.at == f"{A}+1.300", "all of them")
    assert scorer.rows == rows_after(300)
    assert scorer.loaded == [A]


def test_what_a_full_disk_did_not_take_is_in_the_next_file(
    world: World, publisher: DeltaPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    publisher.publish(a_delta(A, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("engine.streaming.deltas.delta_files.write_whole", full)
        for sequence in (2, 3, 4):
            assert not publisher.publish(a_delta(A, 1, sequence)).waits
    publisher.publish(a_delta(A, 1, 5))
    assert [(file.sequence, delta.after) for file in publisher.files.of(A, 1) for delta, _ in [_read(file)]] == [
        (1, 0),
        (5, 1),
    ]
    world.deltas.trim(0, world.deltas.ends()[0])  # type: ignore[attr-defined]
    _, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{A}+1.5", "all of them")
    assert scorer.rows == rows_after(5)


def _read(file: Any) -> tuple[Delta, int]:
    found: tuple[Delta, int] | None = file.read()
    assert found is not None
    return found


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_files_with_a_gap_make_a_bundle_due_and_it_closes_the_gap(
    world: World, publisher: DeltaPublisher, damage: str
) -> None:
    for sequence in range(1, 20):
        publisher.publish(a_delta(A, 1, sequence))
    path = world.registry.folder / "deltas" / f"{A}+1.7.delta"
    if damage == "truncated":
        os.truncate(path, 50)
    else:
        path.unlink()
    for sequence in range(20, MOST_FILES + 4):
        publisher.publish(a_delta(A, 1, sequence))
    shrunk(publisher)
    assert publisher.gapped
    bundle = cast("Any", SimpleNamespace(version=A, name="films"))
    chain = Chain(publisher, bundle, 1, PublishConfig(bundle_seconds=1e6), cast("Any", None))
    assert not chain.bundle_due, "one was published just now"
    chain._bundled -= 60
    assert chain.bundle_due
    publisher.publish_bundle(world.bundles[B], 1, "the files have a gap")
    assert not publisher.gapped
    assert not chain.bundle_due
    publisher.publish(a_delta(B, 1, 1))
    _, scorer = world.follower()
    wait_for(lambda: scorer.at == f"{B}+1.1", "the new chain")


def test_shrinking_leaves_a_chain_with_a_gap_as_it_is(tmp_path: Path) -> None:
    files = DeltaFiles(tmp_path)
    for sequence in (2, 3, 4, 5):
        files.write(a_delta(A, 1, sequence), encode(a_delta(A, 1, sequence), "float32"))
    with pytest.raises(BundleError, match="a delta between 0 and 2 is missing"):
        files.shrink(A, 1)
    assert len(files.of(A, 1)) == 4
