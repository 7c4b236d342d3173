"""The state page and the dense slots: what a reader takes from them is whole, however quick the writer is."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from engine.bundle import Bundle
from engine.inference.live_files import Generation, Layout, allocate_dense
from engine.inference.live_state import Record, StatePage
from tests.inference.live_world import ended, fork
from tests.streaming.small_bundles import A, B, write_small

BYTES = 400_000


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small(tmp_path / "bundle", A))


def payload(number: int) -> bytes:
    return np.full(BYTES // 8, number, np.int64).tobytes()


def record(number: int) -> Record:
    """Every field says the number."""
    return Record.of(number, number, payload(number), dense=number, epoch=number, sequence=number)


def made(folder: Path, bundle: Bundle) -> Generation:
    StatePage.create(folder, bundle, record(1))
    allocate_dense(folder, payload(0))
    generation = Generation(folder, Layout({}), {}, None)
    generation.write_dense(1, payload(1))
    return generation


def test_what_is_read_while_another_process_writes_without_a_pause_is_of_one_version(
    bundle: Bundle, tmp_path: Path
) -> None:
    generation, last = made(tmp_path, bundle), 4000

    def writer() -> None:
        page = StatePage.open(tmp_path, bundle, writable=True)
        for number in range(2, last + 1):
            found = record(number)
            generation.write_dense(found.slot, payload(number))
            page.write(found)

    page, seen, read = StatePage.open(tmp_path, bundle), 1, 0
    child, until = fork(writer), time.monotonic() + 60
    while seen < last and time.monotonic() < until:
        found = page.read()
        n = found.number
        assert (found.generation, found.dense, found.epoch, found.sequence) == (n, n, n, n)
        assert n >= seen
        data = generation.read_dense(found.slot, found.dense_bytes, found.dense_crc)
        if data is not None:  # else the writer came round meanwhile, and the next record is asked for
            assert data == payload(n)
            read += 1
        seen = n
    assert ended(child) == 0
    assert (seen, page.read()) == (last, record(last))
    assert read > 0


def test_a_record_that_is_half_written_leaves_the_one_before(bundle: Bundle, tmp_path: Path) -> None:
    made(tmp_path, bundle)
    page = StatePage.open(tmp_path, bundle, writable=True)
    page.write(record(2))
    raw = bytearray((tmp_path / "state").read_bytes())
    page.write(record(3))
    whole = (tmp_path / "state").read_bytes()
    changed = [at for at in range(len(raw)) if raw[at] != whole[at]]
    for count in range(len(changed)):  # the first bytes of record 3 are there, the last are those of record 1
        for at in changed[:count]:
            raw[at] = whole[at]
        (tmp_path / "state").write_bytes(raw)
        assert StatePage.open(tmp_path, bundle).read() == record(2)
    assert page.raw() == StatePage.open(tmp_path, bundle).raw()


def test_pages_that_cannot_be_used_are_none(bundle: Bundle, tmp_path: Path) -> None:
    assert StatePage.open(tmp_path, bundle) is None
    made(tmp_path, bundle)
    state = tmp_path / "state"
    whole = state.read_bytes()
    assert StatePage.open(tmp_path, bundle) is not None
    for damaged in (b"", whole[:-1], bytes(4096), b"PXLIVE9\0" + whole[8:], whole[:1024] + bytes(3072)):
        state.write_bytes(damaged)
        assert StatePage.open(tmp_path, bundle) is None


def test_the_page_says_who_writes_and_whether_rows_are_between_two_versions(bundle: Bundle, tmp_path: Path) -> None:
    import os

    made(tmp_path, bundle)
    page, other = StatePage.open(tmp_path, bundle, writable=True), StatePage.open(tmp_path, bundle)
    assert (other.writer, other.dirty) == ((0, 0.0), False)
    before = time.time()
    page.beat()
    page.dirty = True
    pid, beat = other.writer
    assert pid == os.getpid()
    assert before <= beat <= time.time()
    assert other.dirty
    page.dirty = False
    assert not other.dirty
    assert other.in_place
    StatePage.create(tmp_path, Bundle.open(write_small(tmp_path / "b", B)), record(1))
    assert not other.in_place
