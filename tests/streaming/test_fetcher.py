"""What is read ahead of a learner: everything, in order, in chunks that are bounded and follow from the log alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.components import LogReader, LogRecord
from engine.streaming.learning.fetch import Chunk, Fetcher
from tests.streaming.memory_log import MemoryLog

MOST = 1000
_SIZES = st.lists(st.one_of(st.integers(1, 40), st.integers(300, 2500)), max_size=60)


def written(sizes: Sequence[Sequence[int]]) -> MemoryLog:
    """A log whose partition p has records of sizes[p]."""
    log = MemoryLog(partitions=len(sizes))
    for partition, its in enumerate(sizes):
        empty = MemoryLog(partitions=len(sizes))
        key = next(k for k in map(str, range(1000)) if empty.append([(k, b"")])[0][0] == partition)
        for size in its:
            log.append([(key, bytes(size))])
    return log


def drained(log: MemoryLog, positions: Mapping[int, int], chunk: int, after: int = -1) -> list[Chunk]:
    fetcher = Fetcher(log, positions, chunk, until=log.ends(), after=after, most_bytes=MOST)
    chunks = []
    while not fetcher.done or not fetcher._queue.empty():
        found = fetcher.get(0.05)
        if found is not None:
            chunks.append(found)
    fetcher.close()
    return chunks


def told(chunks: Sequence[Chunk]) -> list[tuple[int, list[int], int, bool]]:
    return [(c.partition, [r.offset for r in c.records], c.next, c.ended) for c in chunks]


@settings(deadline=None, max_examples=40)
@given(st.lists(_SIZES, min_size=1, max_size=3), st.integers(1, 20))
def test_all_comes_in_order_in_chunks_that_are_bounded_by_count_and_bytes(sizes: list[list[int]], chunk: int) -> None:
    chunks = drained(written(sizes), dict.fromkeys(range(len(sizes)), 0), chunk)
    for partition, its in enumerate(sizes):
        mine = [c for c in chunks if c.partition == partition]
        assert [r.offset for c in mine for r in c.records] == list(range(len(its)))
        assert [c.ended for c in mine] == [False] * (len(mine) - 1) + [True]
        for c in mine:
            assert len(c.records) <= chunk
            assert sum(len(r.value) for r in c.records[:-1]) < MOST
            whole = len(c.records) == chunk or sum(len(r.value) for r in c.records) >= MOST
            assert whole or c.ended, "no chunk ends early"


@settings(deadline=None, max_examples=25)
@given(st.lists(_SIZES, min_size=1, max_size=3), st.integers(1, 20), st.integers(0, 1000))
def test_who_comes_back_at_any_chunk_gets_the_chunks_that_were_left(
    sizes: list[list[int]], chunk: int, place: int
) -> None:
    log = written(sizes)
    positions = dict.fromkeys(range(len(sizes)), 0)
    chunks = drained(log, positions, chunk)
    done = chunks[: place % (len(chunks) + 1)]
    for c in done:
        positions[c.partition] = c.next
    again = drained(log, positions, chunk, after=done[-1].partition if done else -1)
    left = told(chunks)[len(done) :]
    ended = {c.partition for c in done if c.ended}
    assert [t for t in told(again) if t[0] not in ended] == left


class _Careless(MemoryLog):
    """Its readers give a record although they were told to pause."""

    def reader(self, positions: Mapping[int, int] | None, group: str | None = None) -> LogReader:
        reader = super().reader(positions, group)
        poll = reader.poll
        reader.pause = lambda partitions: None  # type: ignore[method-assign]

        def one(limit: int = 1000, timeout: float = 0.1) -> list[LogRecord]:
            return poll(1, timeout)

        reader.poll = one  # type: ignore[method-assign]
        return reader


def test_a_record_that_comes_while_the_learner_is_behind_is_not_lost() -> None:
    log = _Careless()
    log.append([("u", str(n).encode()) for n in range(50)])
    fetcher = Fetcher(log, {0: 0}, 10, ahead=1)
    while not fetcher.paused:
        fetcher._stop.wait(0.01)
    offsets: list[int] = []
    while len(offsets) < 50:
        found = fetcher.get(5.0)
        assert found is not None, f"only {len(offsets)} came"
        offsets += [r.offset for r in found.records]
    fetcher.close()
    assert offsets == list(range(50))
