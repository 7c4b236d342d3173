"""What becomes of single rankings and interactions, and that thinned negatives can be corrected for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config_learning import JoinConfig
from engine.errors import ConfigError
from engine.streaming.join.emitted import CORRECTION, NEGATIVE, POSITIVE, Emitted
from engine.streaming.join.join import Joiner
from engine.streaming.join.shown import Shown
from engine.streaming.join.thinning import uniform
from tests.streaming.join_oracle import Interactions, Rankings

NAMES = ["click", "order", "view"]


class Stream:
    """One task with a window of 100 seconds, unless `options` say otherwise; slots are 10 * request + item."""

    def __init__(self, *tasks: str, **options: Any) -> None:
        tasks = tasks or ("click",)
        types = {"click": ["click", "order"], "order": ["order"]}
        options = {"window_seconds": 100, "lateness_seconds": 10} | options
        self.joiner = Joiner(tasks, {t: types[t] for t in tasks}, JoinConfig(**options))

    def add(
        self, *rankings: tuple[int, float, list[int]], then: list[tuple[int, int, str, float]] | None = None
    ) -> Emitted:
        requests = np.array([r[0] for r in rankings], np.int64)
        items = [item for _, _, mine in rankings for item in mine]
        slots = [10 * request + item for request, _, mine in rankings for item in mine]
        offsets = np.cumsum([0, *(len(mine) for _, _, mine in rankings)])
        then = then or []
        return self.joiner.add(
            Rankings(requests, np.array([r[1] for r in rankings], float)),  # type: ignore[arg-type]
            Interactions(
                np.array([i[0] for i in then], np.int64),
                np.array([i[1] for i in then], np.int64),
                NAMES,
                np.array([NAMES.index(i[2]) for i in then], np.int16),
                np.array([i[3] for i in then], float),
            ),  # type: ignore[arg-type]
            Shown(np.array(slots, np.int64), np.array(items, np.int64), offsets),
        )

    def advance(self, watermark: float) -> Emitted:
        return self.joiner.advance(watermark)

    def counted(self) -> dict[str, int]:
        """What is not zero, without what only came in."""
        came = ("rankings", "impressions", "interactions")
        return {name: n for name, n in self.joiner.counts.items() if n and name not in came}


def said(out: Emitted) -> list[tuple[int, list[float | None], int]]:
    """(slot, labels, kind) of each example."""
    labels = [[None if np.isnan(v) else float(v) for v in row] for row in out.labels]
    return list(zip(out.slot.tolist(), labels, out.kind.tolist(), strict=True))


def test_a_click_makes_its_impression_positive_at_once_and_the_window_s_end_the_others_negative() -> None:
    stream = Stream()
    assert said(stream.add((1, 0.0, [1, 2, 3]))) == []
    assert said(stream.add(then=[(1, 2, "click", 30.0)])) == [(12, [1.0], POSITIVE)]
    assert said(stream.advance(100.0)) == []  # an event of time 100 may still come
    out = stream.advance(100.5)
    assert said(out) == [(11, [0.0], NEGATIVE), (13, [0.0], NEGATIVE)]
    assert out.request.tolist() == [1, 1]
    assert out.item.tolist() == [1, 3]
    assert out.seconds.tolist() == [0.0, 0.0]
    assert stream.counted() == {"joined": 1, "click.positives": 1, "click.negatives": 2}


def test_a_click_before_its_ranking_waits_for_it() -> None:
    stream = Stream()
    assert said(stream.add(then=[(1, 2, "click", 30.0)])) == []
    assert stream.joiner.waiting() == {"interactions": 1, "click": 0}
    out = stream.add((1, 0.0, [1, 2]))
    assert said(out) == [(12, [1.0], POSITIVE)]
    assert out.seconds.tolist() == [30.0]


def test_a_click_whose_ranking_never_comes_is_an_orphan_when_its_own_window_is_over() -> None:
    stream = Stream()
    stream.add(then=[(1, 2, "click", 30.0)])
    stream.advance(130.0)
    assert stream.counted() == {}
    stream.advance(130.5)
    assert stream.counted() == {"orphans": 1}
    assert said(stream.add((1, 0.0, [1, 2]))) == []


@pytest.mark.parametrize(("policy", "expected"), [("correct", [(11, [1.0], CORRECTION)]), ("drop", [])])
def test_a_click_behind_its_window_corrects_or_is_only_counted(policy: str, expected: list[Any]) -> None:
    stream = Stream(late=policy)
    stream.add((1, 0.0, [1]))
    assert said(stream.advance(101.0)) == [(11, [0.0], NEGATIVE)]
    assert said(stream.add(then=[(1, 1, "click", 99.0)])) == expected  # in time, but it came too late
    assert said(stream.add(then=[(1, 1, "click", 99.5)])) == []
    fate = {"corrections": 1} if policy == "correct" else {"lost_late": 1}
    assert stream.counted() == {"late": 1, "repeats": 1, "click.negatives": 1} | fate


def test_an_ended_impression_is_kept_for_one_more_window_and_lateness() -> None:
    stream = Stream()
    stream.add((1, 0.0, [1]))
    assert stream.advance(210.0).freed.tolist() == []
    assert stream.advance(210.5).freed.tolist() == [11]
    stream.add(then=[(1, 1, "click", 205.0)])
    assert stream.joiner.waiting()["interactions"] == 1  # its ranking is not known any more


def test_a_late_click_behind_one_in_time_of_the_same_call_is_a_repeat() -> None:
    stream = Stream()
    stream.add((1, 0.0, [1]))
    assert said(stream.add(then=[(1, 1, "click", 50.0), (1, 1, "click", 150.0)])) == [(11, [1.0], POSITIVE)]
    assert stream.counted() == {"joined": 1, "repeats": 1, "click.positives": 1}


def test_a_late_click_before_one_in_time_corrects_and_the_other_still_decides() -> None:
    stream = Stream()
    stream.add((1, 0.0, [1]))
    out = stream.add(then=[(1, 1, "click", 150.0), (1, 1, "click", 50.0)])
    assert said(out) == [(11, [1.0], CORRECTION), (11, [1.0], POSITIVE)]
    assert said(stream.advance(1000.0)) == []


def test_an_item_that_was_not_shown_is_foreign_and_named() -> None:
    stream = Stream()
    stream.add((1, 0.0, [1]))
    out = stream.add(then=[(1, 1, "view", 1.0), (1, 9, "click", 1.0), (0, 1, "click", 1.0)])
    assert said(out) == []
    assert out.foreign.tolist() == [1]
    assert stream.counted() == {"irrelevant": 1, "foreign": 1, "unattributed": 1}


def test_a_ranking_seen_twice_opens_once_and_gives_its_slots_back() -> None:
    stream = Stream()
    stream.add((1, 0.0, [1, 2]))
    assert stream.add((1, 5.0, [1, 2])).freed.tolist() == [11, 12]
    assert stream.add((2, 5.0, [3, 3])).freed.tolist() == [23]
    assert stream.counted() == {"duplicate_rankings": 1, "duplicate_items": 1}


def test_one_interaction_that_decides_two_tasks_is_one_example() -> None:
    stream = Stream("click", "order")
    stream.add((1, 0.0, [1, 2]))
    assert said(stream.add(then=[(1, 1, "order", 1.0)])) == [(11, [1.0, 1.0], POSITIVE)]
    assert said(stream.advance(101.0)) == [(12, [0.0, 0.0], NEGATIVE)]


def test_a_task_with_a_longer_window_is_decided_later_and_alone() -> None:
    stream = Stream("click", "order", window_seconds={"click": 100, "order": 1000})
    stream.add((1, 0.0, [1, 2]))
    assert said(stream.add(then=[(1, 1, "click", 1.0)])) == [(11, [1.0, None], POSITIVE)]
    assert said(stream.advance(500.0)) == [(12, [0.0, None], NEGATIVE)]
    assert stream.joiner.waiting() == {"interactions": 0, "click": 0, "order": 2}
    assert said(stream.add(then=[(1, 2, "order", 900.0)])) == [
        (12, [None, 1.0], POSITIVE),
        (12, [1.0, None], CORRECTION),
    ]
    assert said(stream.advance(1001.0)) == [(11, [None, 0.0], NEGATIVE)]


def test_beyond_the_limit_the_oldest_end_early() -> None:
    stream = Stream(max_pending=3)
    stream.add((1, 5.0, [1, 2]))
    assert said(stream.add((2, 0.0, [3, 4]))) == [(23, [0.0], NEGATIVE), (24, [0.0], NEGATIVE)]
    assert stream.counted() == {"early": 2, "click.negatives": 2}
    assert said(stream.add(then=[(2, 3, "click", 1.0)])) == [(23, [1.0], CORRECTION)]


def test_features_of_ended_impressions_are_bounded_too_and_what_is_lost_is_counted() -> None:
    stream = Stream(max_pending=2)
    stream.add((1, 0.0, [1, 2]))
    stream.advance(101.0)
    stream.add((2, 100.0, [1, 2]))
    assert stream.advance(201.0).freed.tolist() == [11, 12]
    assert said(stream.add(then=[(1, 1, "click", 90.0)])) == []
    assert stream.counted() == {"late": 1, "lost_late": 1, "click.negatives": 4}


def test_a_refused_ranking_is_not_joined() -> None:
    joiner = Joiner(["click"], {"click": ["click"]}, JoinConfig())
    none = np.empty(0, np.int64)
    out = joiner.add(
        Rankings(np.array([5, 6]), np.array([0.0, 0.0])),  # type: ignore[arg-type]
        Interactions(none, none, [], none, none),  # type: ignore[arg-type]
        Shown(np.array([0]), np.array([7]), np.array([0, 0, 1]), {0: "feature 'price' is numeric"}),
    )
    assert len(out.freed) == 0
    assert {"rankings": 2, "refused_rankings": 1, "impressions": 1}.items() <= joiner.counts.items()


def test_windows_are_asked_for_by_task() -> None:
    with pytest.raises(ConfigError, match=r"window_seconds: task 'order' needs"):
        Joiner(["click", "order"], {}, JoinConfig(window_seconds={"click": 5}))
    with pytest.raises(ConfigError, match=r"labels: no task 'buy'; there are click"):
        Joiner(["click"], {"buy": ["buy"]}, JoinConfig())


def test_thinning_is_even_the_same_everywhere_and_follows_the_seed() -> None:
    request, item = np.arange(100_000) // 10, np.arange(100_000) % 10
    drawn = uniform(request, item, 1)
    assert np.abs(np.histogram(drawn, 20, (0, 1))[0] - 5000).max() < 350  # five standard deviations
    assert abs(np.corrcoef(drawn, uniform(request, item, 2))[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
    # murmur3's finaliser in Python's integers
    h = 12345 ^ 9
    for value in (None, 678):
        h ^= 0 if value is None else value
        h ^= h >> 33
        h = h * 0xFF51AFD7ED558CCD % 2**64
        h ^= h >> 33
        h = h * 0xC4CEB9FE1A85EC53 % 2**64
        h ^= h >> 33
    assert uniform(np.array([12345]), np.array([678]), 9)[0] == (h >> 11) / 2**53


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logistic regression by Newton's method -> weights, the last one the intercept."""
    x = np.column_stack([x, np.ones(len(x))])
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p))
    return w


def test_logits_trained_on_thinned_negatives_are_right_again_with_the_logarithm_of_the_rate() -> None:
    random, n, rate = np.random.default_rng(0), 200_000, 0.1
    true = np.array([0.8, -0.5, -2.0])
    x = random.normal(size=(n, 2))
    clicked = random.random(n) < 1 / (1 + np.exp(-(x @ true[:2] + true[2])))
    joiner = Joiner(["click"], {"click": ["click"]}, JoinConfig(negatives=rate, window_seconds=100), seed=5)
    rows = np.arange(n)
    request, item = rows // 20 + 1, rows % 20
    which = np.flatnonzero(clicked)
    positive = joiner.add(
        Rankings(np.unique(request), np.zeros(n // 20)),  # type: ignore[arg-type]
        Interactions(request[which], item[which], ["click"], np.zeros(len(which), np.int16), np.ones(len(which))),  # type: ignore[arg-type]
        Shown(rows, item, np.arange(0, n + 1, 20)),
    )
    negative = joiner.advance(101.0)
    assert joiner.counts["click.thinned"] == pytest.approx(0.9 * (n - len(which)), rel=0.01)
    slot = np.concatenate([positive.slot, negative.slot])
    label = np.concatenate([positive.labels[:, 0], negative.labels[:, 0]])
    assert (label == clicked[slot]).all()

    trained = fitted(x[slot], label)
    corrected = trained + np.array([0, 0, np.log(negative.rate[0])])
    everything = fitted(x, clicked.astype(float))
    assert np.abs(trained - true).max() > 2  # ln(10) off before
    assert np.abs(corrected - true).max() < 0.05
    assert np.abs(corrected - everything).max() < 0.05
    predicted = 1 / (1 + np.exp(-(x @ corrected[:2] + corrected[2])))
    assert predicted.mean() / clicked.mean() == pytest.approx(1, abs=0.03)


def test_room_follows_what_is_known_and_not_what_came() -> None:
    joiner = Joiner(["click"], {"click": ["click"]}, JoinConfig(window_seconds=10, lateness_seconds=0))
    none = np.empty(0, np.int64)
    freed = 0
    for second in range(2_000):
        requests, slots = np.arange(20 * second, 20 * second + 20), np.arange(60)
        out = joiner.add(
            Rankings(requests, np.full(20, float(second))),  # type: ignore[arg-type]
            Interactions(none, none, [], none, none),  # type: ignore[arg-type]
            Shown(slots, np.tile(np.arange(3), 20), np.arange(0, 61, 3)),
        )
        freed += len(out.freed) + len(joiner.advance(float(second)).freed)
        known = min(second + 1, 22) * 20  # twice the window, and what ends in this second
        assert len(joiner._shown._rankings) <= max(2 * known, known + 1024) + 20
    assert freed == (2_000 - 21) * 60
    state = joiner.state()
    assert len(state["rankings.request"]) == 21 * 20
    assert len(state["impressions.item"]) == 21 * 60
