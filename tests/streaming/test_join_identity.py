"""The join against dictionaries, event by event, over sequences of calls that Hypothesis makes up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config_learning import JoinConfig
from engine.errors import CheckpointError
from engine.streaming.join.emitted import Emitted
from engine.streaming.join.join import Joiner
from engine.streaming.join.shown import Shown
from engine.streaming.join.thinning import uniform
from tests.streaming.join_oracle import Interactions, Oracle, Rankings, Row

ANY_SPEED = settings(deadline=None, max_examples=400)

TASKS = ("click", "order")
TYPES = {"click": ["click", "order"], "order": ["order"]}
NAMES = ["click", "order", "view"]

SECONDS = st.integers(0, 10).map(lambda n: 5.0 * n)  # windows and times are multiples of 5, so that they meet
RANKING = st.tuples(st.integers(1, 5), SECONDS, st.lists(st.integers(1, 3), max_size=4))
INTERACTION = st.tuples(st.integers(0, 6), st.integers(1, 4), st.sampled_from([*NAMES, "click"]), SECONDS)
CALL = st.one_of(
    st.tuples(st.just("add"), st.lists(RANKING, max_size=4), st.lists(INTERACTION, max_size=8)),
    st.tuples(st.just("advance"), st.integers(0, 20).map(lambda n: 5.0 * n)),
)
CALLS = st.lists(CALL, min_size=1, max_size=14)
CONFIG = st.fixed_dictionaries(
    {
        "window_seconds": st.sampled_from([10.0, {"click": 10.0, "order": 25.0}, {"click": 20.0, "order": 0.0}]),
        "lateness_seconds": st.sampled_from([0.0, 5.0]),
        "late": st.sampled_from(["correct", "drop"]),
        "max_pending": st.sampled_from([1, 3, 6, 1000]),
        "negatives": st.sampled_from([1.0, 0.5]),
    }
)


class Slots:
    """Numbers slots as they come, each once."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, sizes: list[int]) -> list[list[int]]:
        out = []
        for size in sizes:
            out.append(list(range(self.next, self.next + size)))
            self.next += size
        return out


def arrays(
    rankings: list[Any], interactions: list[Any], slots: list[list[int]]
) -> tuple[Rankings, Interactions, Shown]:
    def column(values: list[Any], dtype: type) -> np.ndarray:
        return np.array(values, dtype)

    sizes = [len(items) for _, _, items in rankings]
    return (
        Rankings(column([r[0] for r in rankings], np.int64), column([r[1] for r in rankings], np.float64)),
        Interactions(
            column([i[0] for i in interactions], np.int64),
            column([i[1] for i in interactions], np.int64),
            NAMES,
            column([NAMES.index(i[2]) for i in interactions], np.int16),
            column([i[3] for i in interactions], np.float64),
        ),
        Shown(
            column([s for mine in slots for s in mine], np.int64),
            column([item for _, _, items in rankings for item in items], np.int64),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ),
    )


def run(joiner: Joiner, call: Any, slots: Slots) -> Emitted:
    if call[0] == "advance":
        return joiner.advance(call[1])
    return joiner.add(*arrays(call[1], call[2], slots([len(r[2]) for r in call[1]])))


def rows(out: Emitted) -> list[Row]:
    labels = np.where(np.isnan(out.labels), -1, out.labels)
    return [
        (slot, request, item, tuple(label), seconds, kind)
        for slot, request, item, label, seconds, kind in zip(
            out.slot.tolist(), out.request.tolist(), out.item.tolist(), labels.tolist(), out.seconds.tolist(),
            out.kind.tolist(), strict=True,
        )
    ]  # fmt: skip


@ANY_SPEED
@given(CALLS, CONFIG)
def test_the_join_gives_what_dictionaries_give_and_its_counts_add_up(calls: list[Any], options: Any) -> None:
    config = JoinConfig(**options)
    joiner = Joiner(TASKS, TYPES, config, seed=7)
    windows = [options["window_seconds"]] * 2
    if isinstance(options["window_seconds"], dict):
        windows = [options["window_seconds"][task] for task in TASKS]
    oracle = Oracle(
        windows,
        {"click": {0}, "order": {0, 1}},
        lateness=config.lateness_seconds,
        most=config.max_pending,
        correct=config.late == "correct",
        keep=lambda request, item: uniform(np.array([request]), np.array([item]), 7)[0] < config.negatives,
    )
    slots, other, given_slots, freed = Slots(), Slots(), 0, []
    for call in calls:
        out = run(joiner, call, slots)
        if call[0] == "advance":
            expected, gone, foreign = oracle.advance(call[1])
        else:
            expected, gone, foreign = oracle.add(call[1], call[2], other([len(r[2]) for r in call[1]]))
        assert rows(out) == expected
        assert set(out.freed.tolist()) == gone
        assert out.foreign.tolist() == foreign
        assert (out.rate == np.float32(config.negatives)).all()
        freed += out.freed.tolist()
    given_slots = slots.next
    assert len(freed) == len(set(freed)), "a slot was freed twice"
    assert set(freed) <= set(range(given_slots))

    counts, waiting = joiner.counts, joiner.waiting()
    for name, count in counts.items():
        task, _, what = name.rpartition(".")
        assert count == oracle.count[f"{what}.{TASKS.index(task)}" if task else name], name
    for task in TASKS:
        decided = sum(counts[f"{task}.{what}"] for what in ("positives", "negatives", "thinned"))
        assert counts["impressions"] == decided + waiting[task]
    fates = ("joined", "repeats", "late", "orphans", "foreign", "unattributed", "irrelevant")
    assert counts["interactions"] == sum(counts[fate] for fate in fates) + waiting["interactions"]
    assert waiting["interactions"] == len(oracle.waiting) <= config.max_pending
    assert counts["corrections"] + counts["lost_late"] >= counts["late"]


@ANY_SPEED
@given(CALLS, CONFIG, st.data())
def test_a_join_that_is_saved_and_loaded_goes_on_bit_by_bit(calls: list[Any], options: Any, data: Any) -> None:
    split = data.draw(st.integers(0, len(calls)))
    unbroken = Joiner(TASKS, TYPES, JoinConfig(**options), seed=3)
    broken = Joiner(TASKS, TYPES, JoinConfig(**options), seed=3)
    slots, other = Slots(), Slots()
    for number, call in enumerate(calls):
        if number == split:
            state = {name: column.copy() for name, column in broken.state().items()}
            broken = Joiner(TASKS, TYPES, JoinConfig(**options), seed=3)
            broken.load(state)
        a, b = run(unbroken, call, slots), run(broken, call, other)
        for name in a.__dataclass_fields__:
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    assert unbroken.counts == broken.counts
    assert unbroken.waiting() == broken.waiting()
    for (name, one), (_, two) in zip(unbroken.state().items(), broken.state().items(), strict=True):
        assert one.tobytes() == two.tobytes(), name


def test_a_state_of_another_window_is_refused() -> None:
    state = Joiner(TASKS, TYPES, JoinConfig(window_seconds=10)).state()
    with pytest.raises(CheckpointError, match="window_seconds"):
        Joiner(TASKS, TYPES, JoinConfig(window_seconds=11)).load(state)
