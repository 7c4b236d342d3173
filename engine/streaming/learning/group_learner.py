"""A learner that shares the partitions out with others of its group, as they come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.components import Capability
from engine.errors import ConfigError
from engine.streaming.events.dead import DeadLetters
from engine.streaming.join.ready import Examples
from engine.streaming.learning.beginning import first_positions
from engine.streaming.learning.checkpointing import Saved
from engine.streaming.learning.fetch import Chunk, Fetched, Fetcher, Given
from engine.streaming.learning.group_fetch import GroupFetcher
from engine.streaming.learning.learner import Learner
from engine.streaming.learning.members import Members
from engine.streaming.learning.parted import PartedStream, folder, partition_of
from engine.streaming.learning.source import joined

log = logging.getLogger("plexrank.learning")

_LOOK_SECONDS = 0.5
"""Between two looks at how far the others are."""


class GroupLearner(Learner):
    """Learns from the partitions that the group `learning.group` gives it.

    Each event is trained exactly once over all learners of the group: a partition's join, its examples that wait and
    its position go from one to the next together. Weights do not: each learner has those of its own partitions, and
    one of them publishes. What a learner had trained since its last checkpoint when it was killed is not in its
    weights any more, and is trained by who gets the partition.

    `run("end")` ends when the group has learnt every partition up to where it ended at that call, whoever learnt it:
    until then this learner is there for partitions that others leave, also without one of its own.
    """

    choices = "a group of another name begins anew, at what the log still holds"
    stream: PartedStream
    _members: Members

    def _own(self, partitions: Sequence[int] | None, locks: Path) -> None:
        if partitions is not None:
            raise ConfigError("--partitions, --share: the group shares the partitions out (learning.group)")
        if Capability.GROUPS not in self.source.capabilities:
            raise ConfigError(
                f"learning.group: the event log '{self.config.serving.event_log.name}' has no groups: share the "
                "partitions out with --share"
            )
        assert self.group is not None
        self.partitions = []
        self._fetching: GroupFetcher | None = None
        self._ends: dict[int, int] | None = None
        self._told: dict[int, int] = {}  # positions in the newest checkpoint
        self._look_at = 0.0
        self._kept_at: dict[int, int] = {}
        self._wanted: dict[int, Given] = {}
        self._leaving: set[int] = set()
        self._members = Members(locks, self.group, self.source.identity, self.out / "checkpoints")
        self._closing.append(self._members.close)

    def _streamed(self, bundle: Bundle, dead: DeadLetters) -> PartedStream:
        self._first = first_positions(bundle, self.source)
        return PartedStream(bundle, lambda: joined(self.config, bundle, dead, self.plugins, self._stopping.is_set))

    def _restore(self, saved: Saved) -> None:
        super()._restore(saved)
        for name, offset in saved.state["positions"].items():
            partition = int(name)
            if self._members.mine(partition):
                self.stream.kept[partition] = self.stream.restored(saved.arrays(f"stream/{folder(partition)}"))
                self._kept_at[partition] = int(offset)

    def _fetcher(self, ends: Mapping[int, int] | None) -> GroupFetcher:
        assert self.group is not None
        self._ends = None if ends is None else self.source.ends()  # also of partitions that are not held yet
        beside = "" if self.learning.source == "events" else f".{self.learning.source}"
        self._fetching = GroupFetcher(self.source, self.group + beside, self.learning.chunk, self._ends)
        return self._fetching

    # ------------------------------------------------------------------------------------------- partitions
    def _take(self, chunk: Fetched, live: bool) -> None:
        if isinstance(chunk, Chunk):
            super()._take(chunk, live)
        elif isinstance(chunk, Given):
            if chunk.partition in self._leaving:
                self._leaving.remove(chunk.partition)
                self._begin_reading(chunk, self.positions[chunk.partition])
            else:
                self._wanted[chunk.partition] = chunk
        elif self._wanted.pop(chunk.partition, None) is None:
            self._leaving.add(chunk.partition)

    def _between(self, fetcher: Fetcher) -> None:
        super()._between(fetcher)
        if self._leaving and self.save() is not None:
            for partition in sorted(self._leaving):
                self._give_up(partition)
        for given in [*self._wanted.values()]:
            if self._members.lock(given.partition) and not self._take_up(given):
                self._members.unlock(given.partition)
        self.partitions = sorted(self.positions)
        if self._ends is not None and self._fetching is not None and self._learnt_up_to(self._ends):
            self._fetching.finish()

    def _learnt_up_to(self, ends: Mapping[int, int]) -> bool:
        """Whether the group has learnt that far, as its checkpoints say; looked at now and then, and this learner's
        is written when it has done its part."""
        if any(at < ends.get(p, 0) for p, at in self.positions.items()) or time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if self._told != self.positions and self.save() is None:
            return False
        reached = {p: self._members.reached(p) for p in ends.keys() - self.positions.keys()}
        return all(ends[p] <= (self._first[p] if at is None else at) for p, at in reached.items())

    def _give_up(self, partition: int) -> None:
        """After the checkpoint that holds it as it stands."""
        self.stream.give_up(partition)
        self._kept_at[partition] = self.positions.pop(partition)
        self._leaving.remove(partition)
        self._members.unlock(partition)
        log.info("gave partition %d up at %d", partition, self._kept_at[partition])

    def _take_up(self, given: Given) -> bool:
        """With its lock held; False: not now."""
        partition = given.partition
        try:
            mine = self._members.mine(partition)
            if mine and partition in self.stream.kept:
                part, offset = self.stream.kept[partition], self._kept_at.pop(partition)
            else:
                found = self._members.find(partition, self.stream)
                part, offset = found or (self.stream.fresh(), self._first[partition])
                self._kept_at.pop(partition, None)
            self.stream.hold(partition, part)
            self._items_changed()
            self.positions[partition] = offset
            if not mine:
                if self.save() is None:
                    raise OSError("the checkpoint could not be written")
                self._members.take(partition)
        except OSError as error:
            log.warning("partition %d is not taken up yet: %s", partition, error)
            if partition in self.stream.held:
                self.stream.give_up(partition)
                self.stream.forget(partition)
                self.positions.pop(partition)
            return False
        log.info("took partition %d up at %d", partition, offset)
        del self._wanted[partition]
        self._begin_reading(given, offset)
        return True

    def _begin_reading(self, given: Given, offset: int) -> None:
        if self._fetching is not None:
            self._fetching.begin(given, offset)

    def _key_of(self, examples: Examples) -> str:
        """Whoever has the partition writes its examples with one key."""
        return str(partition_of(int(examples.slot[0])))

    # ------------------------------------------------------------------------------------------ checkpoints
    def save(self) -> Path | None:
        for partition in [*self.stream.kept]:
            if not self._members.mine(partition):
                self.stream.forget(partition)
                self._kept_at.pop(partition)
        path = super().save()
        if path is not None:
            self._told = dict(self.positions)
            if self._fetching is not None:
                self._fetching.commit(self.positions)
        return path

    def _state(self) -> dict[str, Any]:
        every = {**self._kept_at, **self.positions}
        return {**super()._state(), "positions": {str(p): offset for p, offset in every.items()}}

    def summary(self) -> dict[str, Any]:
        """positions: of the partitions that are held; `kept` those that this learner's checkpoint answers for, too.
        Examples that came with a partition and went with one do not count as joined here: over all learners of the
        group, joined = trained + waiting."""
        kept = {str(p): offset for p, offset in sorted(self._kept_at.items())}
        return {**super().summary(), "group": self.group, "kept": kept, "waiting": self.stream.waiting()}
