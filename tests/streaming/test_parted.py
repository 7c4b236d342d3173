"""A partition's join goes from one learner to another, and one of them answers for it at every moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.components import LogRecord
from engine.config import Config
from engine.errors import CheckpointError
from engine.hashing import fingerprint
from engine.plugins import Plugins
from engine.streaming.events.dead import DeadLetters
from engine.streaming.learning.checkpointing import LearnerCheckpoints
from engine.streaming.learning.fetch import Chunk
from engine.streaming.learning.members import Members
from engine.streaming.learning.parted import PartedStream
from engine.streaming.learning.source import joined
from tests.streaming.film_stream import BEGIN, click, event, ranking
from tests.streaming.memory_log import MemoryLog

LEARNING = {"join": {"window_seconds": 20, "lateness_seconds": 5}}


@pytest.fixture
def parted(tiny_bundle: Path, plugins: Plugins) -> Callable[[], PartedStream]:
    """Makes streams of a learner that holds nothing yet."""
    bundle = Bundle.open(tiny_bundle, verify=False)
    config = Config.model_validate({**bundle.config.model_dump(mode="json"), "learning": LEARNING})
    dead = DeadLetters(MemoryLog())
    return lambda: PartedStream(bundle, lambda: joined(config, bundle, dead, plugins, lambda: False))


def chunk(partition: int, *values: bytes) -> Chunk:
    records = [LogRecord(partition, n, "k", value) for n, value in enumerate(values)]
    return Chunk(partition, records, len(records))


def examples(stream: PartedStream) -> set[tuple[int, int, int]]:
    """(request, item, kind) of all that is ready; their features can be taken."""
    found: set[tuple[int, int, int]] = set()
    while len(stream.ready):
        some = stream.ready.pop(1000)
        assert stream.pending.take(some.slot).targets == len(some)
        found |= set(zip(some.request.tolist(), some.item.tolist(), some.kind.tolist(), strict=True))
    stream.pending.release(stream.ready.free())
    return found


def of(request: str, items: Sequence[str], kind: int) -> set[tuple[int, int, int]]:
    return {(fingerprint(request), fingerprint(item), kind) for item in items}


def test_what_was_shown_to_one_learner_is_clicked_before_another(parted: Callable[[], PartedStream]) -> None:
    first, second = parted(), parted()
    for partition in (0, 1):
        first.hold(partition, first.fresh())
        first.take(chunk(partition, ranking(f"r{partition}", "u1", ["1", "2"], BEGIN)), 0.0)
    state = {n.removeprefix("of-00001/"): v for n, v in first.state().items() if n.startswith("of-00001/")}
    first.give_up(1)
    second.hold(1, second.restored(state))
    second.take(chunk(1, click("c", "u1", "2", "r1", BEGIN + 1), ranking("r2", "u1", ["3"], BEGIN + 60)), 0.0)
    first.take(chunk(0, ranking("r3", "u1", ["3"], BEGIN + 60)), 0.0)
    assert examples(second) == of("r1", ["2"], 0) | of("r1", ["1"], 1)
    assert examples(first) == of("r0", ["1", "2"], 1), "another's partition is not learnt from any more"
    assert (first.counts["rankings"], second.counts["rankings"]) == (3, 1), "each counts what it read"
    assert first.join_counts()["impressions"] == 5
    assert second.join_counts() | {"impressions": 1, "joined": 1} == second.join_counts()
    assert first.waiting() == {"0": 0, "1": 0}
    first.forget(1)
    assert first.counts["rankings"] == 3
    assert not any(name.startswith("of-00001") for name in first.state())


def test_an_item_of_one_partition_is_known_in_all_and_keeps_its_row(parted: Callable[[], PartedStream]) -> None:
    """Also after a restart, in which the partitions come in another order or not at all."""
    stream = parted()
    for partition in (1, 0):
        stream.hold(partition, stream.fresh())
        features = {"genres": "war|all", "year": 1990 + partition}
        stream.take(
            chunk(partition, event("item", f"i{partition}", BEGIN, {"item": f"new{partition}", "features": features})),
            0.0,
        )
    rows = stream.catalogue.rows(["new1", "new0"]).tolist()
    assert rows == [30, 31], "as they came"
    assert [part.pending.catalogue is stream.catalogue for part in stream.held.values()] == [True, True]
    assert np.concatenate(stream.changed_rows).tolist() == [30, 31]
    state = stream.state()
    again = parted()
    again.load(state)
    assert again.catalogue.rows(["new1", "new0"]).tolist() == rows
    for partition in (0, 1):
        mine = {
            n.removeprefix(f"of-{partition:05d}/"): v for n, v in state.items() if n.startswith(f"of-{partition:05d}/")
        }
        again.hold(partition, again.restored(mine))
    assert again.catalogue.rows(["new1", "new0"]).tolist() == rows
    assert again.counts == stream.counts


class Member:
    """A learner as others see it: checkpoints and locks."""

    def __init__(self, folder: Path, name: str, stream: PartedStream) -> None:
        self.stream, self.root = stream, folder / name / "checkpoints"
        self.members = Members(folder / "locks", "films", "log", self.root)
        self.checkpoints = LearnerCheckpoints(self.root, 2)

    def save(self, **positions: int) -> None:
        places = {name[1:]: offset for name, offset in positions.items()}
        state: dict[str, Any] = {"group": "films", "positions": places}
        assert self.checkpoints.save({}, {"stream": self.stream.state()}, state) is not None


def test_the_old_owner_answers_until_the_new_one_has_its_checkpoint_and_says_so(
    parted: Callable[[], PartedStream], tmp_path: Path
) -> None:
    """Whoever is killed at whatever line: the file of the partition leads to a checkpoint that holds its state."""
    old, new, third = (Member(tmp_path, name, parted()) for name in ("old", "new", "third"))
    assert old.members.lock(0)
    assert old.members.find(0, old.stream) is None, "nobody has had it"
    old.stream.hold(0, old.stream.fresh())
    old.save(p0=10)
    old.members.take(0)
    assert not new.members.lock(0), "while the old owner has it"
    old.members.unlock(0)
    assert new.members.lock(0)
    found = new.members.find(0, new.stream)
    assert found is not None
    assert found[1] == 10
    new.stream.hold(0, found[0])
    new.save(p0=10)
    assert old.members.mine(0), "the new owner was killed before it said so: the old checkpoint counts"
    assert not new.members.mine(0)
    new.members.take(0)
    new.save(p0=25)
    assert not old.members.mine(0)
    new.members.close()
    assert third.members.lock(0)
    taken = third.members.find(0, third.stream)
    assert taken is not None
    assert taken[1] == 25
    shutil.rmtree(new.root)
    with pytest.raises(CheckpointError, match="should hold what group films has learnt up to in partition 0"):
        third.members.find(0, third.stream)
