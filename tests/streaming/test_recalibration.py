"""The calibration that follows the stream: Platt's map of the newest rows, whenever each of their classes is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from engine.errors import BundleError, CheckpointError
from engine.streaming.deltas.delta import Delta
from engine.streaming.join.emitted import CORRECTION, NEGATIVE, POSITIVE
from engine.streaming.join.ready import Examples
from engine.streaming.learning.recalibration import EVERY, LEAST, Recalibration, apart
from engine.training.calibration import Calibration

BEGUN = {"click": Calibration("isotonic", np.array([-1, 1], np.float32), np.array([-2, 2], np.float32))}
WINDOW = 4000


def following(window: int = WINDOW, **how: bool) -> Recalibration:
    return Recalibration(["click"], BEGUN, window, **{"follow": True, **how})


def examples(labels: np.ndarray, seconds: np.ndarray, *, rate: float = 1.0, kind: np.ndarray | None = None) -> Examples:
    n, number = len(labels), np.arange(len(labels))
    kinds = np.where(labels > 0.5, POSITIVE, NEGATIVE) if kind is None else kind
    return Examples(
        number, number, number, labels[:, None].astype(np.float32), np.ones(n, np.float32),
        np.full(n, rate, np.float32), seconds.astype(np.float64), kinds.astype(np.int8),
    )  # fmt: skip


def truth(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is three times too sure and off by one, and labels."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 3, n).astype(np.float32)
    return logits, (random.random(n) < 1 / (1 + np.exp(-(logits - 1) / 3))).astype(np.float64)


def fed(into: Recalibration, logits: np.ndarray, labels: np.ndarray, size: int = 250, begin: int = 0) -> Recalibration:
    """Rows a second apart, each known at once."""
    for at in range(0, len(logits), size):
        part = slice(at, at + size)
        into.observe({"click": logits[part]}, examples(labels[part], begin + np.arange(len(logits))[part]))
    return into


def test_it_is_the_maximum_likelihood_sigmoid_of_the_newest_window() -> None:
    logits, labels = truth(10_000)
    logits[:5000] *= -1  # a model of long ago
    its = fed(following(), logits, labels).now["click"]
    peer = LogisticRegression(C=1e9, tol=1e-9).fit(logits[-WINDOW:, None], labels[-WINDOW:])
    assert its.kind == "platt"
    assert its.slope == pytest.approx(peer.coef_[0, 0], abs=0.02)  # the last fit may be some hundred rows old
    assert its.values[0] == pytest.approx(peer.intercept_[0], abs=0.05)
    assert its.apply(logits[-WINDOW:]).mean() == pytest.approx(labels[-WINDOW:].mean(), abs=0.01)


def test_until_there_are_enough_of_each_class_it_is_the_bundles() -> None:
    logits, _ = truth(EVERY)
    few = np.zeros(EVERY)
    few[: LEAST - 1] = 1
    assert fed(following(), logits, few).now["click"] is BEGUN["click"]
    half = np.zeros(EVERY)
    half[:LEAST] = 1
    assert fed(following(), logits, half).now["click"] is not BEGUN["click"]


def test_a_class_that_is_rare_is_looked_for_further_back() -> None:
    logits, _ = truth(20_000)
    labels = (np.arange(20_000) % 25 == 0).astype(np.float64)  # 160 in the window, 800 in five of them
    its = fed(following(), logits, labels).now["click"]
    assert its.kind == "platt"
    assert its.apply(logits).mean() == pytest.approx(0.04, abs=2e-3)


def test_where_it_does_not_follow_it_stays_the_bundles() -> None:
    alone = fed(following(follow=False), *truth(5000))
    assert alone.now == BEGUN
    assert alone.take_delta() == {}
    assert alone.state() == {}


def test_thinned_negatives_stand_for_those_that_were_left_out() -> None:
    logits, labels = truth(8000)
    whole = following(8000)
    fed(whole, logits, labels)
    thinned = following(8000)
    kept = (labels > 0.5) | (np.arange(8000) % 4 == 0)
    thinned.observe({"click": logits[kept]}, examples(labels[kept], np.flatnonzero(kept), rate=0.25))
    assert thinned.now["click"].kind == "platt"
    assert thinned.now["click"].slope == pytest.approx(whole.now["click"].slope, abs=0.02)
    assert thinned.now["click"].values[0] == pytest.approx(whole.now["click"].values[0], abs=0.1)


def test_corrections_gaps_and_scores_that_are_no_numbers_are_left_out() -> None:
    logits, labels = truth(3000)
    whole = fed(following(), logits, labels)
    more = following()
    for at in range(0, 3000, 250):
        part = slice(at, at + 250)
        x, y = np.append(logits[part], [9, 9, np.nan]), np.append(labels[part], [1, np.nan, 0])
        kind = np.append(np.where(labels[part] > 0.5, POSITIVE, NEGATIVE), [CORRECTION, NEGATIVE, NEGATIVE])
        seconds = np.append(np.arange(3000)[part], [0, 0, 0])
        more.observe({"click": x.astype(np.float32)}, examples(y, seconds, kind=kind))
    assert same(more.now["click"], whole.now["click"])


def test_a_positive_counts_when_the_negatives_of_its_time_are_known() -> None:
    """Clicks come at once, what was not clicked 1,000 seconds later; meanwhile ten times as much is shown. As it comes,
    ten clicks would be seen for each negative; one in two is clicked."""
    random = np.random.default_rng(0)
    calm, busy = np.sort(random.uniform(0, 1000, 4000)), np.sort(random.uniform(1000, 2000, 40_000))
    seconds = np.append(calm, busy)
    clicked = random.random(len(seconds)) < 0.5
    into = following(2000)
    known = np.where(clicked, seconds, seconds + 1000)
    order = np.argsort(known, kind="stable")
    order = order[known[order] < 2000]
    assert clicked[order][-2000:].mean() > 0.85
    for at in range(0, len(order), 100):
        part = order[at : at + 100]
        into.observe({"click": np.zeros(len(part), np.float32)}, examples(clicked[part] * 1.0, seconds[part]))
    assert float(into.now["click"].apply(np.zeros(1, np.float32))[0]) == pytest.approx(0.5, abs=0.05)


def test_positives_that_wait_are_bounded_and_keep_their_weight() -> None:
    """40,000 clicks without a negative: what is kept stands for all of them."""
    into = following(1000)
    for at in range(0, 40_000, 500):
        into.observe({"click": np.zeros(500, np.float32)}, examples(np.ones(500), np.arange(at, at + 500)))
    seconds, _, weight = into.state()["0/waiting"]
    assert len(seconds) <= 4000
    assert weight.sum() == pytest.approx(40_000)
    for quarter in range(4):  # of each time as many
        of_it = (seconds >= 10_000 * quarter) & (seconds < 10_000 * (quarter + 1))
        assert weight[of_it].sum() == pytest.approx(10_000, rel=0.02)


def same(a: Calibration, b: Calibration) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.to_tensors().values(), b.to_tensors().values(), strict=True))


def test_one_that_comes_back_from_its_state_goes_on_to_the_last_bit() -> None:
    logits, labels = truth(12_000)
    whole = fed(following(), logits, labels)
    first = fed(following(), logits[:5000], labels[:5000])
    again = following()
    again.load(first.state())
    assert same(again.now["click"], first.now["click"])
    fed(again, logits[5000:], labels[5000:], begin=5000)
    assert same(again.now["click"], whole.now["click"])
    for name, value in whole.state().items():
        np.testing.assert_array_equal(value, again.state()[name])


def test_a_state_of_another_window_is_refused_and_one_of_a_learner_that_did_not_follow_is_none() -> None:
    state = fed(following(), *truth(5000)).state()
    with pytest.raises(CheckpointError, match=r"learning\.guard\.window was changed"):
        following(2000).load(state)
    into = following()
    into.load({})
    assert into.now == BEGUN


def test_what_changed_is_given_out_once_and_after_a_return_once_more() -> None:
    into = following()
    assert into.take_delta() == {}
    logits, labels = truth(5000)
    fed(into, logits, labels)
    given = into.take_delta()
    assert set(given) == {f"calibration.click.{part}" for part in ("kind", "thresholds", "values", "slope")}
    assert into.take_delta() == {}
    again = following()
    again.load(into.state())
    assert again.take_delta().keys() == given.keys()


def delta(**dense: torch.Tensor) -> Delta:
    return Delta("m", "b" * 12, 0, 1, 0.0, 0.0, {}, dense=dense)


def test_a_deltas_calibration_is_told_apart_from_its_weights() -> None:
    weights = {"ranker.bias": torch.ones(1)}
    tasks = ["click", "click.twice"]
    fitted = {task: Calibration.fit(*truth(500, seed), "platt") for seed, task in enumerate(tasks)}
    named = {n: t for task, its in fitted.items() for n, t in its.to_tensors(f"calibration.{task}.").items()}
    rest, found = apart(delta(**weights, **named), tasks)
    assert rest.dense == weights
    assert found.keys() == fitted.keys()
    assert all(same(found[task], fitted[task]) for task in tasks)
    plain = delta(**weights)
    assert apart(plain, tasks) == (plain, {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"calibration.buy.kind": torch.tensor([1])}, "'calibration.buy.kind' is of no task"),
        ({"calibration.kind": torch.tensor([1])}, "'calibration.kind' is of no task"),
        ({"calibration.click.values": torch.tensor([2.0, 1.0])}, "not an increasing map"),
        ({"calibration.click.values": torch.tensor([1.0, torch.inf])}, "not an increasing map"),
        ({"calibration.click.values": torch.tensor([[1.0, 2.0]])}, "not an increasing map"),
        ({"calibration.click.slope": torch.tensor([0.0])}, "not an increasing map"),
        ({"calibration.click.kind": torch.tensor([9])}, "cannot be read"),
    ],
)
def test_a_calibration_that_is_none_is_refused(change: dict[str, torch.Tensor], says: str) -> None:
    named = Calibration.fit(*truth(500), "platt").to_tensors("calibration.click.")
    with pytest.raises(BundleError, match=says):
        apart(delta(**{**named, **change}), ["click"])


def test_a_calibration_of_which_a_part_is_missing_is_refused() -> None:
    named = Calibration.fit(*truth(500), "platt").to_tensors("calibration.click.")
    del named["calibration.click.slope"]
    with pytest.raises(BundleError, match="cannot be read"):
        apart(delta(**named), ["click"])
