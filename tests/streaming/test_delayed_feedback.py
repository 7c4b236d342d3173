"""Conversions that come hours after what was shown: what is learnt meanwhile, and how near the truth it is."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.components import DelayedFeedback, LogRecord
from engine.config import Config
from engine.errors import CheckpointError
from engine.events import EventLimits
from engine.hashing import fingerprint
from engine.hookspecs import hookimpl
from engine.plugins import GROUP, Plugins
from engine.streaming.events.decode import decode_records
from engine.streaming.join.pending import PendingExamples
from engine.streaming.learning.audit import RECORD
from engine.streaming.learning.learner import Learner
from engine.training.calibration import Calibration
from plugins.feedback.fnc import FakeNegativeCalibrated
from plugins.feedback.fnw import FakeNegativeWeighted
from tests.streaming.film_stream import BEGIN, Stream, click, ranking, visits
from tests.streaming.memory_log import MemoryLog
from tests.streaming.test_learner import _mixed

OFTEN, SELDOM = 0.7, 0.25
"""How often one film of three is converted in the end, and the others."""
DELAY = 300.0
"""Seconds from ranking to conversion, on average; exponential."""
WINDOW = 5000.0


class Naive(DelayedFeedback):
    """Negatives at once, and nothing corrected: what fnw and fnc are to be better than."""

    name = "naive"
    presumed_after = 0.0

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def weight(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        return None


@hookimpl
def delayed_feedback() -> list[type[DelayedFeedback]]:
    return [Naive]


@pytest.fixture(scope="module")
def with_naive() -> Plugins:
    return Plugins([*entry_points(group=GROUP), EntryPoint("delayed_feedback.naive", __name__, GROUP)])


def configured(bundle: Path, feedback: str | None, join: dict[str, Any] | None = None, **learning: Any) -> Config:
    whole = Bundle.open(bundle, verify=False).config.model_dump(mode="json")
    named = {} if feedback is None else {"feedback": {"liked": {"name": feedback}}}
    join = {"window_seconds": 20, "lateness_seconds": 5, **(join or {}), **named}
    more = {"batch_size": 32, "chunk": 50, "checkpoint_events": 100_000, **learning}
    return Config.model_validate({**whole, "learning": {"join": join, **more}})


def run(
    config: Config, log: MemoryLog, out: Path, plugins: Plugins, bundle: Path, whole: bool = False, **how: Any
) -> dict[str, Any]:
    """whole: the last batch is taken, too, though it is not full."""
    learner = Learner(config, log, out, plugins=plugins, bundle=bundle, **how)
    try:
        summary = learner.run("end")
        if not whole:
            return summary
        learner.batches.take(learner.stream.ready.pop(config.learning.batch_size))
        return learner.summary()
    finally:
        learner.close()


# ---------------------------------------------------------------------------------------------- nearer the truth
def conversions(count: int, upto: float) -> tuple[Stream, np.ndarray]:
    """`count` rankings a second apart with late conversions, as far as they came by `upto` -> and the truth of each
    impression, float64 [5 count]."""
    rng = np.random.default_rng(4)
    stream, truth, events = Stream(), [], []
    for number in range(count):
        moment, user = BEGIN + number, int(rng.integers(40))
        items, request, name = rng.choice(30, 5, replace=False), f"r{number}", f"u{user}"
        events.append((moment, name, ranking(request, name, [str(i) for i in items], moment)))
        for item in items:
            truth.append(OFTEN if item % 3 == 0 else SELDOM)
            if rng.random() < truth[-1]:
                at = moment + rng.exponential(DELAY)
                events.append((at, name, click(f"{request}-{item}", name, str(item), request, at)))
    events = sorted((e for e in events if e[0] <= upto), key=lambda e: e[:2])
    stream.events = [(key, value) for _, key, value in events]
    return stream, np.array(truth)


def said(bundle: Bundle, plugins: Plugins, stream: Stream) -> np.ndarray:
    """What a bundle's model says of every impression, uncalibrated, float64 [n]."""
    records = [LogRecord(0, n, key, value) for n, (key, value) in enumerate(stream.events)]
    rankings = decode_records(records, EventLimits(), BEGIN + 1e6, 300).rankings
    pending = PendingExamples(bundle.encoder, bundle.catalogue)
    batch = pending.take(pending.add(rankings).slot)
    with torch.no_grad():
        return Calibration().apply(bundle.model(plugins)(batch)["liked"]).astype(np.float64)


def test_before_any_window_ends_the_weighted_rate_is_nearer_the_truth_than_the_naive_one_and_than_waiting(
    tiny_bundle: Path, with_naive: Plugins, tmp_path: Path
) -> None:
    """25 minutes of rankings, conversions after 5 minutes on average, a window of 83 minutes: when it stops no window
    has ended. Waiting has seen no negative; the naive stream has 1 + p examples of each impression, p of them positive,
    and says p / (1 + p): .41 and .20 in place of .70 and .25."""
    count = 1500
    stream, truth = conversions(count, BEGIN + count)
    log = MemoryLog()
    stream.write(log)
    often = truth == OFTEN
    rates, errors = {}, {}
    for name in ("wait", "naive", "fnw", "fnc"):
        config = configured(
            tiny_bundle, name, {"window_seconds": WINDOW}, batch_size=64, embedding_lr=0.1, dense_lr=0.005,
            retrieval=False,
        )  # fmt: skip
        summary = run(config, log, tmp_path / name, with_naive, tiny_bundle)
        assert summary["join"]["liked.negatives"] == 0
        p = said(Bundle.open(tmp_path / name / "bundle"), with_naive, stream)
        rates[name] = (p[often].mean(), p[~often].mean())
        errors[name] = float(np.abs(p - truth).mean())
    print(rates, errors)
    assert rates["naive"][0] < OFTEN - 0.15
    assert rates["wait"][1] > SELDOM + 0.3
    for name in ("fnw", "fnc"):
        assert abs(rates[name][0] - OFTEN) < 0.06
        assert abs(rates[name][1] - SELDOM) < 0.06
        assert errors[name] < 0.6 * errors["naive"]
        assert errors[name] < 0.5 * errors["wait"]


# ----------------------------------------------------------------------------------------- each once, judged once
def kinds(audit: Path) -> dict[int, list[tuple[int, int]]]:
    """kind -> (request, item) of what was trained."""
    trained = np.fromfile(audit, RECORD)
    found: dict[int, list[tuple[int, int]]] = {}
    for row in trained:
        found.setdefault(int(row["kind"]), []).append((int(row["request"]), int(row["item"])))
    return found


@pytest.mark.parametrize("feedback", ["fnw", {"name": "fnw", "options": {"after_seconds": 3}}, "fnc"])
def test_every_impression_is_trained_as_a_negative_once_and_again_when_it_is_positive_and_judged_once(
    feedback: Any, tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """The same log under `wait`: the same impressions are judged with the same labels."""
    stream = visits(200)
    log = MemoryLog()
    stream.write(log)
    how = feedback if isinstance(feedback, dict) else {"name": feedback}
    config = configured(tiny_bundle, None, {"feedback": {"liked": how}})
    summary = run(config, log, tmp_path / "presumed", plugins, tiny_bundle, whole=True, audit=tmp_path / "audit")
    waited = run(configured(tiny_bundle, "wait"), log, tmp_path / "wait", plugins, tiny_bundle, whole=True)
    after = 0.0 if isinstance(feedback, str) else 3.0
    seen = {(fingerprint(r), fingerprint(i)) for r, i in stream.shown if after == 0 or int(r.split("-")[1]) < 191}
    trained = kinds(tmp_path / "audit")
    assert set(trained) == {0, 3}
    assert sorted(trained[0]) == sorted((fingerprint(r), fingerprint(i)) for r, i in stream.liked)
    assert len(trained[3]) == len(set(trained[3]))
    assert set(trained[3]) >= seen
    examples, join = summary["examples"], summary["join"]
    assert examples["presumed"] == len(trained[3]) == join["liked.presumed"]
    assert examples["settled"] == join["liked.negatives"] == waited["join"]["liked.negatives"] > 0
    assert examples["negative"] == examples["waiting"] == 0
    assert examples["joined"] == examples["trained"] + examples["settled"]
    assert summary["join"]["liked.positives"] == waited["join"]["liked.positives"]
    figures, other = (its["figures"]["tasks"]["liked"] for its in (summary, waited))
    assert summary["figures"]["examples"] == waited["figures"]["examples"]
    assert figures["positives"] == other["positives"]
    assert figures["base"] == pytest.approx(other["base"], abs=1e-6), "the frozen bundle, on the same rows"


def test_presumed_negatives_are_trained_once_wherever_it_stops(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path
) -> None:
    """With thinned negatives, copies, poison and item events; stopped after every few chunks, without a last word."""
    log = MemoryLog(partitions=2)
    _mixed().write(log)
    config = configured(tiny_bundle, "fnw", {"negatives": 0.6}, checkpoint_events=170)
    whole = run(config, log, tmp_path / "whole", plugins, tiny_bundle, audit=tmp_path / "whole.audit")
    for stops in range(100):
        learner = Learner(
            config, log, tmp_path / "broken", plugins=plugins, bundle=tiny_bundle, audit=tmp_path / "broken.audit"
        )
        learner._finish = lambda drained: None  # type: ignore[method-assign]
        left, take = [1 + stops % 4], learner._take

        def counting(chunk: Any, live: bool, take: Any = take, left: list[int] = left, its: Learner = learner) -> None:
            take(chunk, live)
            left[0] -= 1
            if left[0] <= 0:
                its.stop()

        learner._take = counting  # type: ignore[method-assign]
        learner.run("end")
        learner.close()
        if learner.positions == log.ends() and left[0] > 0:
            break
    last = run(config, log, tmp_path / "broken", plugins, tiny_bundle, audit=tmp_path / "broken.audit")
    assert stops > 5
    for name in ("events", "join", "examples", "examples_sha256", "open", "steps", "positions", "figures"):
        assert last[name] == whole[name], name
    assert (tmp_path / "whole.audit").read_bytes() == (tmp_path / "broken.audit").read_bytes()
    one, two = (Bundle.open(tmp_path / n / "bundle").manifest.files for n in ("whole", "broken"))
    assert one["model.safetensors"] == two["model.safetensors"]
    thinned = whole["join"]["impressions"] - whole["join"]["liked.presumed"]
    assert 0.3 < thinned / whole["join"]["impressions"] < 0.5


def test_a_checkpoint_of_other_feedback_is_refused(tiny_bundle: Path, plugins: Plugins, tmp_path: Path) -> None:
    log = MemoryLog()
    visits(30).write(log)
    run(configured(tiny_bundle, "fnw"), log, tmp_path, plugins, tiny_bundle)
    with pytest.raises(CheckpointError, match=r"learning\.join\.feedback says; put the old ones back"):
        run(configured(tiny_bundle, "wait"), log, tmp_path, plugins, tiny_bundle)


# -------------------------------------------------------------------------------------------------- the formulas
def test_the_weights_and_logits_are_the_papers() -> None:
    """By hand, at p = 3/4: a positive counts 7/4, a negative 1/4 of that; b = p / (1 + p) = 3/7."""
    logits = torch.log(torch.tensor([3.0, 3.0]))
    fnw, fnc = (kind(kind.Options()) for kind in (FakeNegativeWeighted, FakeNegativeCalibrated))
    torch.testing.assert_close(fnw.weight(logits, torch.tensor([1.0, 0.0])), torch.tensor([7 / 4, 7 / 16]))
    torch.testing.assert_close(torch.sigmoid(fnc.logits(logits)), torch.tensor([3 / 7, 3 / 7]))
