"""A segment may end while another thread waits for its fsync."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from plugins.events.partition import Partition, Retention


def test_a_segment_that_ends_before_its_fsync_is_synced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(tmp_path / "0000", 0, Retention(segment_bytes=4096))
    partition.own()
    _, mark = partition.append([(b"u", bytes(5000), ())])
    sync, rolled, first = os.fsync, [], partition.segments()[0].inode

    def slow(handle: int) -> None:
        """What waits for the disk is overtaken by an append that begins the next segment, once."""
        if not rolled:
            rolled.append(True)
            other = threading.Thread(target=partition.append, args=([(b"u", b"next", ())],))
            other.start()
            other.join()
            assert len(partition.segments()) == 2
            assert os.fstat(handle).st_ino == first, "not of a file that has its number by now"
        sync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    before: Any = partition._out
    partition.sync(mark)
    assert rolled
    assert before.closed
    assert [r.value for r in partition.read(0)] == [bytes(5000), b"next"]
    partition.close()
