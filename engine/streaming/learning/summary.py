"""What a learner says of itself: at the end, in a bundle, in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.streaming.join.emitted import KINDS, SETTLED
from engine.streaming.join.ready import ReadyExamples
from engine.streaming.learning.chain import or_none

if TYPE_CHECKING:
    from engine.streaming.learning.learner import Learner


def summary_of(learner: Learner) -> dict[str, Any]:
    """Counts that add up: events in = the other counts of `events`; examples joined = trained + settled + waiting.

    examples_sha256: `ExamplesDigest` of all that was joined; None where partitions come and go, or a checkpoint of an
    older version began without it.
    """
    stream, counts, giving = learner.stream, learner.counts, learner.giving
    events = stream.counts
    return {
        "model": learner.bundle.name,
        "version": learner.bundle.version,
        "steps": learner.trainer.steps,
        "events": {"in": events["events"], **{name: events[name] for name in stream.OUTCOMES}},
        "join": stream.join_counts(),
        "open": stream.open(),
        "examples": {
            "joined": events["examples"],
            "trained": counts["trained"],
            "waiting": len(stream.ready),
            **{kind: counts[kind] for kind in KINDS if kind != KINDS[SETTLED]},
            "settled": counts["settled"],
        },
        "examples_sha256": _digest(learner),
        "expired": learner.model.rows.expired,
        "published": 0 if giving is None else giving.chain.published,
        "bundles": counts["bundles"],
        "held": counts["held"],
        "rollbacks": counts["rollbacks"],
        "checkpoints_failed": learner.checkpoints.failed,
        "positions": {str(p): offset for p, offset in sorted(learner.positions.items())},
        "newest": or_none(learner.newest),
        "figures": learner.judge.validation.figures(),
        "seconds": {stage: round(its, 3) for stage, its in learner.spent.seconds.items()},
    }


def figures_of(learner: Learner) -> dict[str, Any]:
    """What a bundle says of how it was learnt."""
    return {
        "learner": learner.learner,
        "stream": learner.source.identity,
        "positions": {str(p): offset for p, offset in learner.positions.items()},
        "steps": learner.trainer.steps,
        "trained": learner.counts["trained"],
        "newest": or_none(learner.newest),
        "examples": None if learner.digest is None else learner.digest.as_json(),
    }


def state_of(learner: Learner) -> dict[str, Any]:
    """Of a checkpoint what JSON can hold."""
    alone = {"base": learner.bundle.version, "epoch": 0, "sequence": 0}
    return {
        **(alone if learner.giving is None else learner.giving.state()),
        "learner": learner.learner,
        "identity": learner.source.identity,
        "group": learner.group,
        "positions": {str(p): offset for p, offset in learner.positions.items()},
        "turn": learner.turn,
        "counts": dict(learner.counts),
        "newest": or_none(learner.newest),
        "judge": learner.judge.state(),
        "examples": None if learner.digest is None else learner.digest.as_json(),
    }


def _digest(learner: Learner) -> str | None:
    """With the examples that wait, so that it does not depend on where a batch ends."""
    if learner.digest is None:
        return None
    ready = learner.stream.ready
    assert isinstance(ready, ReadyExamples)
    waiting = ready.waiting()
    if not len(waiting):
        return learner.digest.hexdigest()
    whole = learner.digest.copy()
    whole.add(learner.stream.pending.take(waiting.slot), waiting)
    return whole.hexdigest()
