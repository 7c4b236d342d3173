"""Which learner of a group has a partition's state, and where: one small file a partition, changed in one step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError

from engine.errors import CheckpointError, EventError
from engine.files import write_whole
from engine.streaming.learning.checkpointing import beside, positions_beside
from engine.streaming.learning.locks import PartitionLocks
from engine.streaming.learning.parted import Part, PartedStream, folder

log = logging.getLogger("plexrank.learning")


class Holder(msgspec.Struct, forbid_unknown_fields=True):
    """Whose newest whole checkpoint holds a partition's state. checkpoints: its folder, absolute."""

    identity: str
    checkpoints: str


class Members:
    """The partitions of one group, in a folder that all of its learners share.

    A partition is learnt from by who has its lock, from the state that its `Holder` leads to. A new owner writes the
    state into a checkpoint of its own, and then the holder's file: whenever either of two learners is killed, one of
    them answers for the partition, with all that was trained of it and nothing else.
    """

    def __init__(self, folder: Path, group: str, identity: str, own: Path) -> None:
        """folder: of the locks. identity: of the log. own: this learner's checkpoints."""
        self._locks_at, self._folder = folder, folder / f"group-{group}"
        self._identity, self._own = identity, str(own.resolve())
        self._group = group
        self._locks: dict[int, PartitionLocks] = {}
        self._waited: set[int] = set()
        self._folder.mkdir(parents=True, exist_ok=True)

    # ----------------------------------------------------------------------------------------------- locks
    def lock(self, partition: int) -> bool:
        """Whether no other process learns from it now, and none will until `unlock`."""
        if partition in self._locks:
            return True
        try:
            self._locks[partition] = PartitionLocks(self._locks_at, [partition])
        except EventError as error:
            if partition not in self._waited:
                log.info("waits for a partition: %s", error)
            self._waited.add(partition)
            return False
        self._waited.discard(partition)
        return True

    def unlock(self, partition: int) -> None:
        self._locks.pop(partition).release()

    def close(self) -> None:
        for partition in [*self._locks]:
            self.unlock(partition)

    # --------------------------------------------------------------------------------------------- holders
    def mine(self, partition: int) -> bool:
        """Whether this learner's checkpoint is what counts."""
        holder = self._holder(partition)
        return holder is not None and holder.checkpoints == self._own

    def take(self, partition: int) -> None:
        """This learner's newest checkpoint counts from now on. OSError where it cannot be written."""
        holder = Holder(self._identity, self._own)
        write_whole(self._path(partition), msgspec.json.encode(holder))

    def find(self, partition: int, stream: PartedStream) -> tuple[Part, int] | None:
        """A partition's state as its holder left it, and its next offset; None: nobody has had it.

        CheckpointError where it is not to be found any more. OSError: it was written anew meanwhile; ask again.
        """
        holder = self._holder(partition)
        if holder is None:
            return None
        root = Path(holder.checkpoints)
        found = beside(root)
        state: dict[str, Any] = {} if found is None else found.state
        offset = state.get("positions", {}).get(str(partition))
        if found is None or offset is None or state.get("group") != self._group:
            raise CheckpointError(
                f"{root}: it should hold what group {self._group} has learnt up to in partition {partition}, and does "
                "not: put its checkpoints back, or begin a group of another name"
            )
        try:
            arrays = found.arrays(f"stream/{folder(partition)}")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        return stream.restored(arrays), int(offset)

    def reached(self, partition: int) -> int | None:
        """Up to where a partition is learnt, as its holder's newest checkpoint says; None: nobody has had it, or it is
        not to be read now."""
        holder = self._holder(partition)
        return None if holder is None else positions_beside(Path(holder.checkpoints)).get(partition)

    def _holder(self, partition: int) -> Holder | None:
        path = self._path(partition)
        try:
            holder = msgspec.json.decode(path.read_bytes(), type=Holder)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}: {error}; begin a group of another name") from None
        if holder.identity != self._identity:
            raise CheckpointError(
                f"{path}: group {self._group} learns from another log ({holder.identity}) than the configured one "
                f"({self._identity}); begin a group of another name"
            )
        return holder

    def _path(self, partition: int) -> Path:
        return self._folder / f"partition-{partition:05d}.json"
