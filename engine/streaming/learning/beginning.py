"""Where a learner begins: which model, which checkpoint, which positions; what does not fit is refused with choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.components import EventLog
from engine.config import Config
from engine.errors import BundleError, CheckpointError
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.learning.checkpointing import LearnerCheckpoints, Saved
from engine.streaming.learning.span import Moment, Places, Start, located

CHOICES = (
    "choose with --from: 'earliest' or 'latest' begin from the bundle at the oldest or the newest record, 'bundle' at "
    "the positions that the bundle was learnt up to, offsets (0:1200,1:900) or a time there"
)


@dataclass(frozen=True)
class Beginning:
    """bundle: the model. epoch: of its chain. saved: the checkpoint that it goes on from, if there is one.
    positions: partition -> the next offset."""

    bundle: Bundle
    epoch: int
    saved: Saved | None
    positions: dict[int, int]


def begin(
    config: Config,
    source: EventLog,
    partitions: Sequence[int],
    checkpoints: LearnerCheckpoints,
    *,
    given: Path | None,
    registry: ModelRegistry | None,
    publisher: DeltaPublisher | None,
    start: Start | None,
    group: str | None = None,
) -> Beginning:
    """Finds it out; a registry without a model takes the bundle that is given as its first.

    start: None goes on from the newest checkpoint, and without one begins where the bundle was learnt up to, else at
    the oldest record. group: shares the partitions out later, and knows where each begins; none is given here then.

    CheckpointError: the checkpoint is of another log, of other partitions, or of a model that was left; or it is wanted
    and not there. BundleError: there is no model, or it is of other features. EventError: the log holds no such place.
    """
    goes_on = start in (None, "checkpoint")
    saved = checkpoints.newest() if goes_on or start == "bundle" else None
    if saved is None and start == "checkpoint":
        raise CheckpointError(f"{checkpoints.root}: there is no checkpoint to go on from; {CHOICES}")
    if registry is None or publisher is None:
        if given is None:
            raise BundleError("there is no model to learn on: give --bundle, or --models")
        bundle, epoch = Bundle.open(given), 0
    else:
        pointer = registry.current()
        if pointer is None:
            if given is None:
                raise BundleError(f"{registry.root}: no model is current; give --bundle to begin with")
            pointer = publisher.publish_bundle(given, registry.new_epoch(), "begun")
        bundle, epoch = Bundle.open(registry.bundle(pointer.version)), pointer.epoch
    if bundle.schema != config.schema_():
        raise BundleError(f"{bundle.path}: its features or tasks are not the configuration's; train it again")
    if saved is not None and goes_on:
        _check(saved, source, partitions, bundle, epoch, published=registry is not None, group=group)
        kept = saved.state["positions"]
        return Beginning(bundle, epoch, saved, {p: int(kept[str(p)]) for p in partitions})
    if registry is not None and publisher is not None and publisher.reached(bundle.version, epoch):
        epoch = registry.renew("a learner began anew from it").epoch  # followers may be ahead of it
    previous = saved.state["positions"] if saved is not None and _same_log(saved, source) else None
    return Beginning(bundle, epoch, None, _positions(bundle, source, partitions, start, previous))


def _same_log(saved: Saved, source: EventLog) -> bool:
    return bool(saved.state["identity"] == source.identity)


def _check(
    saved: Saved,
    source: EventLog,
    partitions: Sequence[int],
    bundle: Bundle,
    epoch: int,
    *,
    published: bool,
    group: str | None,
) -> None:
    state = saved.state
    if not _same_log(saved, source):
        raise CheckpointError(
            f"{saved.path}: its positions are of another log ({state['identity']}) than the configured one "
            f"({source.identity}); {CHOICES}"
        )
    if state.get("group") != group:
        raise CheckpointError(
            f"{saved.path}: it is of {_called(state.get('group'))}, not of {_called(group)}; give another --out"
        )
    before = sorted(int(p) for p in state["positions"])
    if group is None and before != list(partitions):
        raise CheckpointError(
            f"{saved.path}: it is of partitions {before}, not {list(partitions)}: a join's state cannot be divided; "
            f"take the same partitions, or another --out, or {CHOICES}"
        )
    if (state["base"], state["epoch"]) == (bundle.version, epoch) or (published and _own_child(state, bundle)):
        return
    raise CheckpointError(
        f"{saved.path}: it was learnt on {state['base']} (epoch {state['epoch']}), and {bundle.version} (epoch "
        f"{epoch}) is the model now; {CHOICES}"
    )


def _called(group: str | None) -> str:
    return "a learner without a group" if group is None else f"group {group}"


def first_positions(bundle: Bundle, source: EventLog) -> dict[int, int]:
    """Where each partition begins that nobody has learnt from: where the bundle ends, else at the oldest record."""
    return _positions(bundle, source, sorted(source.begins()), None, None)


def _own_child(state: Mapping[str, Any], bundle: Bundle) -> bool:
    """A bundle that this learner published just before it was killed, when the checkpoint was not written yet."""
    made_by = (bundle.manifest.metrics.get("learning") or {}).get("learner")
    return bool(bundle.manifest.parent == state["base"] and made_by == state["learner"])


def _positions(
    bundle: Bundle,
    source: EventLog,
    partitions: Sequence[int],
    start: Start | None,
    previous: Mapping[str, int] | None,
) -> dict[int, int]:
    """Without a checkpoint. previous: of the one that is left, for a bundle that says none."""
    if isinstance(start, Places | Moment):
        return located(source, start, partitions)
    begins, ends = source.begins(), source.ends()
    if start == "latest":
        return {p: ends[p] for p in partitions}
    learnt = bundle.manifest.metrics.get("learning") or {}
    kept = learnt.get("positions") if learnt.get("stream") == source.identity else previous
    if kept is None and start == "bundle":
        raise BundleError(
            f"{bundle.path}: it says no positions of this log ({source.identity}); begin with --from earliest, latest, "
            "offsets or a time"
        )
    if kept is None or start == "earliest":
        return {p: begins[p] for p in partitions}
    return {p: int(kept.get(str(p), begins[p])) for p in partitions}
