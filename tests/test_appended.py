"""Arrays that grow in place: nothing that somebody holds changes, and nothing is copied that need not be."""

from __future__ import annotations

import numpy as np

from engine.appended import appended


def test_an_array_grows_without_moving_and_the_shorter_ones_stay() -> None:
    first = np.arange(100)
    arrays, wanted = [appended(first, np.array([100]))], [*range(101)]
    for n in range(101, 120):
        arrays.append(appended(arrays[-1], np.array([n])))
        wanted.append(n)
    assert arrays[-1].tolist() == wanted
    assert [len(a) for a in arrays] == [*range(101, 121)]
    assert all(np.shares_memory(arrays[0], a) for a in arrays)
    assert all(a.tolist() == wanted[: len(a)] for a in arrays)
    assert not np.shares_memory(first, arrays[0])
    assert type(arrays[-1]) is np.ndarray


def test_it_moves_where_its_room_is_used_up() -> None:
    small = appended(np.zeros((4, 2), np.float32), np.ones((1, 2)))
    large = appended(small, np.full((10, 2), 2.0))
    assert not np.shares_memory(small, large)
    assert large.dtype == np.float32
    assert large[:, 0].tolist() == [0] * 4 + [1] + [2] * 10


def test_the_second_that_grows_from_one_does_not_write_over_the_first() -> None:
    before = appended(np.arange(100), np.array([100]))
    one, two = appended(before, np.array([1])), appended(before, np.array([2]))
    assert (one[-1], two[-1], before[-1]) == (1, 2, 100)


def test_what_is_no_beginning_of_the_memory_is_copied() -> None:
    grown = appended(np.arange(100), np.array([100]))
    for part in (grown[1:], grown[:50], grown[::2], grown[::-1], grown.view(np.float64)):
        more = appended(part, np.array([7], part.dtype))
        assert more.tolist() == [*part.tolist(), 7]
    assert grown.tolist() == [*range(101)]


def test_texts_grow_too() -> None:
    texts = appended(np.empty(0, object), np.array(["a", "b"], object))
    assert appended(texts, np.array(["c"], object)).tolist() == ["a", "b", "c"]
