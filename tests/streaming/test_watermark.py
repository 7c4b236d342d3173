"""Event time as the partitions show it, and what silence and wrong clocks do to it."""

from __future__ import annotations

import math

import pytest

from engine.streaming.join.watermark import Watermarks


def watermarks(*newest: float, lateness: float = 10, idle: float = 5) -> Watermarks:
    """Partitions 0, 1, ... with these newest events, seen at second 0 of this machine's time."""
    marks = Watermarks(lateness, idle)
    for partition, seconds in enumerate(newest):
        marks.observe(partition, seconds, 0.0)
    return marks


def silent(marks: Watermarks, start: float, seconds: float) -> float:
    """Asks once a second -> the last answer."""
    value = -math.inf
    for second in range(1, int(seconds) + 1):
        value = marks.value(start + second)
    return value


def test_the_slowest_partition_counts_less_the_lateness() -> None:
    assert watermarks(1000, 700, 900).value(0) == 690


def test_it_never_goes_back() -> None:
    marks = watermarks(1000)
    assert marks.value(0) == 990
    marks.observe(0, 400, 1)
    assert marks.value(1) == 990
    marks.observe(1, 5, 1)
    assert marks.value(1) == 990


def test_a_partition_that_is_read_but_has_brought_nothing_holds_the_others_until_it_is_idle() -> None:
    marks = watermarks(1000, math.nan)
    assert marks.value(0) == -math.inf
    for second in range(1, 7):
        marks.observe(0, 1000 + second, second)
    assert marks.value(6) == 996


def test_a_silent_partition_is_left_out_and_counts_again_when_it_speaks() -> None:
    marks = watermarks(1000, 700)
    for second in range(1, 6):
        marks.observe(0, 1000 + second, second)
        assert marks.value(second) == 690
    marks.observe(0, 1006, 6)
    assert marks.value(6) == 996
    marks.observe(1, 1500, 7)
    assert marks.value(7) == 996  # partition 0 is now the slower one
    marks.observe(0, 1100, 7)
    assert marks.value(7) == 1090


def test_where_all_are_silent_event_time_goes_on_with_the_clock_from_the_newest_event() -> None:
    assert silent(watermarks(1000, 700), 0, 6) == 990 + (6 - 5)
    assert silent(watermarks(1000, 700), 0, 65) == 990 + (65 - 5)


def test_the_silence_of_all_begins_with_the_last_event_of_any() -> None:
    marks = watermarks(1000, 700)
    for second in range(1, 8):
        marks.observe(1, 700 + second, second)
        assert marks.value(second) == 690 + second
    assert silent(marks, 7, 5) == 697  # partition 0 has been idle since second 6, partition 1 is waited for
    assert silent(marks, 12, 3) == 990 + 3


def test_an_event_after_a_silence_does_not_put_event_time_back() -> None:
    marks = watermarks(1000)
    assert silent(marks, 0, 105) == 990 + 100
    marks.observe(0, 1010, 106)
    assert marks.value(106) == 1090
    marks.observe(0, 1200, 107)
    assert marks.value(107) == 1190


def test_where_the_clock_stands_still_events_alone_move_event_time() -> None:
    marks = watermarks(1000, 700)
    assert [marks.value(0.0) for _ in range(1000)] == [690] * 1000


def test_before_the_first_event_there_is_no_event_time_however_long_the_silence() -> None:
    assert silent(watermarks(math.nan, math.nan), 0, 100) == -math.inf
    assert silent(Watermarks(10, 5), 0, 100) == -math.inf


def test_a_partition_at_its_end_is_left_out_until_more_comes_of_it() -> None:
    marks = watermarks(1000, 700)
    marks.finish(1)
    assert marks.value(0) == 990
    marks.observe(1, 1005, 0)
    marks.observe(0, 1200, 0)
    assert marks.value(0) == 995
    marks.finish(0)
    marks.finish(1)
    assert marks.value(0) == 1190


def test_a_partition_that_another_reader_has_now_is_not_waited_for() -> None:
    marks = watermarks(1000, 700)
    marks.forget(1)
    assert marks.value(0) == 990


def test_a_clock_that_is_put_back_keeps_no_partition_from_being_idle() -> None:
    marks = watermarks(1000, 700)
    marks.observe(0, 1001, -3600)
    for second in range(1, 8):
        marks.observe(0, 1001 + second, second - 3600)
    assert marks.value(7 - 3600) == 998


def test_a_clock_that_is_put_forward_makes_no_partition_idle_at_once() -> None:
    marks = watermarks(1000, 700)
    assert marks.value(3600) == 690
    marks.observe(1, 1000, 3600)
    assert marks.value(3600) == 990


@pytest.mark.parametrize("broken_at", range(1, 8))
def test_a_state_that_is_loaded_goes_on(broken_at: int) -> None:
    def run(split: int | None) -> list[float]:
        marks, values = watermarks(1000, 700, math.nan), []
        for second in range(8):
            if second == split:
                state = marks.state()
                marks = Watermarks(10, 5)
                marks.load(state)
                marks.value(second - 1)  # time goes on from the first question
            marks.observe(0, 1000 + second, second)
            values.append(marks.value(second))
        return values

    assert run(broken_at) == run(None)
