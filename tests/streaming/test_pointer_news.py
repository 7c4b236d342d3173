"""Servers that see the registry late, or a copy of it, hear of a promotion or rollback from the stream `models`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from engine.cli import build
from engine.loading import load_config
from engine.plugins import installed
from engine.streaming.deltas.announce import announce, tell
from engine.streaming.deltas.follower import DeltaFollower
from engine.streaming.deltas.pointer import Pointer, decode_pointer
from engine.streaming.deltas.registry import ModelRegistry
from engine.streaming.events.open_log import open_log
from tests.streaming.chain_world import A, B, RowScorer, World, a_delta, rows_after, wait_for
from tests.streaming.memory_log import MemoryLog
from tests.streaming.small_bundles import write_small


@pytest.fixture
def world(world: World) -> World:
    """B is current, A was before it."""
    world.registry.publish(world.bundles[A], 1, "first")
    world.registry.publish(world.bundles[B], 2, "better")
    return world


def late_copy(world: World, tmp_path: Path) -> tuple[DeltaFollower, RowScorer, ModelRegistry]:
    """A server whose folder of the registry stands still from now on."""
    shutil.copytree(world.registry.root, tmp_path / "mount")
    registry, scorer = ModelRegistry(tmp_path / "mount"), RowScorer()
    follower = DeltaFollower(world.deltas, world.models, registry, scorer).start()
    world.followers.append(follower)
    wait_for(lambda: scorer.at == B, "the copy's pointer is served")
    return follower, scorer, registry


def test_a_rollback_that_a_mount_does_not_show_is_followed_from_the_stream(world: World, tmp_path: Path) -> None:
    _, scorer, registry = late_copy(world, tmp_path)
    pointer = world.registry.rollback(reason="clicks fell")
    announce(world.models, pointer)
    wait_for(lambda: scorer.at == A, "the rollback is served")
    stale = registry.current()
    assert stale is not None
    assert stale.version == B
    publisher = world.publisher()
    publisher.publish(a_delta(A, pointer.epoch, 1))
    wait_for(lambda: scorer.rows == rows_after(1), "deltas behind it are applied")


def test_what_the_stream_says_again_or_late_does_not_put_a_server_back(world: World, tmp_path: Path) -> None:
    follower, scorer, _ = late_copy(world, tmp_path)
    first, second = world.registry.rollback(), world.registry.promote(B)
    for pointer in (second, first, first):
        announce(world.models, pointer)
    wait_for(lambda: follower.status().epoch == second.epoch, "the newest is followed")
    announce(world.models, first)
    promoted = world.registry.promote(A)
    announce(world.models, promoted)
    wait_for(lambda: scorer.at == A, "and the next one")
    assert follower.status().epoch == promoted.epoch


def test_two_pointers_of_one_epoch_are_ordered_though_the_clock_is_put_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.registry.publish(world.bundles[A], 5, "learned")
    monkeypatch.setattr("engine.streaming.deltas.registry.time.time", lambda: first.created - 3600.0)
    second = world.registry.publish(world.bundles[B], 5, "learned")
    assert second.follows(first)
    assert not first.follows(second)
    assert not first.follows(first)


def test_a_stream_that_tells_of_another_registry_is_passed_over(world: World, tmp_path: Path) -> None:
    """One that was deleted and begun anew gives small epochs again, and the stream remembers the great ones."""
    for _ in range(5):
        announce(world.models, world.registry.promote(A))
    anew = ModelRegistry(tmp_path / "anew")
    anew.publish(world.bundles[A], 1, "begun anew")
    pointer = anew.publish(world.bundles[B], 1, "better")
    scorer = RowScorer()
    follower = DeltaFollower(world.deltas, world.models, anew, scorer).start()
    world.followers.append(follower)
    wait_for(lambda: scorer.at == B, "the new registry's pointer")
    announce(world.models, replace_registry(pointer, ""))
    world.deltas.append([("films", part) for part in parts_of(B, 1)])
    wait_for(lambda: scorer.rows == rows_after(1), "its deltas")
    assert follower.status().epoch == 1


def replace_registry(pointer: Pointer, name: str) -> Pointer:
    """As a version before this field wrote it."""
    return msgspec.structs.replace(pointer, registry=name, epoch=99)


def parts_of(base: str, epoch: int) -> list[bytes]:
    from engine.streaming.deltas.delta_codec import encode

    return encode(replace(a_delta(base, epoch, 1)), "float32")


def test_the_registrys_name_is_kept_and_a_repaired_one_is_another(world: World) -> None:
    before = world.registry.current()
    assert before is not None
    assert before.registry
    after = world.registry.rollback()
    assert after.registry == before.registry
    (world.registry.folder / "current.json").write_bytes(b"{")
    repaired = ModelRegistry(world.registry.root).promote(A)
    assert repaired.registry not in ("", before.registry)


# ------------------------------------------------------------------------------------------------ command line
CONFIG = """\
name: films
data:
  source: {interactions: clicks.csv}
  labels: {click: {column: clicked}}
features: [{name: user_id, side: user}, {name: item_id}]
serving: {event_log: {name: local, options: {partitions: 2, fsync: never}}}
"""


def test_a_promotion_by_hand_is_told_to_the_log_while_a_server_writes_it(tmp_path: Path) -> None:
    config, state = tmp_path / "films.yaml", tmp_path / "state"
    config.write_text(CONFIG)
    log = open_log(installed(), load_config(config).serving.event_log, state)
    bundle = write_small(tmp_path / "made", A)
    words = ["models", "promote", str(bundle), "--models", str(tmp_path / "models"), "--config", str(config)]
    words += ["--state-dir", str(state), "--json"]
    result = CliRunner().invoke(build(words), words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    models = log.sibling("models", partitions=1, compact=True)
    (record,) = models.read({0: 0})
    assert decode_pointer(record.value, "x") == ModelRegistry(tmp_path / "models").current()
    assert record.key == "films"
    models.close()
    log.close()


def test_where_the_log_cannot_be_told_the_pointer_holds_and_the_command_says_so(tmp_path: Path) -> None:
    config = tmp_path / "films.yaml"
    config.write_text(CONFIG)
    bundle = write_small(tmp_path / "made", A)
    words = ["models", "promote", str(bundle), "--models", str(tmp_path / "models"), "--config", str(config)]
    words += ["--state-dir", str(tmp_path / "absent"), "--json"]
    result = CliRunner().invoke(build(words), words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "the log was not told" in result.stderr
    assert json.loads(result.stdout)["version"] == A


def test_telling_lets_go_of_the_stream_that_a_learner_writes() -> None:
    class Counted(MemoryLog):
        closed = 0

        def sibling(self, name: str, *, partitions: int | None = None, compact: bool = False) -> MemoryLog:
            assert (name, partitions, compact) == ("models", 1, True)
            beside = super().sibling(name, partitions=partitions, compact=compact)
            beside.close = lambda: setattr(Counted, "closed", Counted.closed + 1)  # type: ignore[method-assign]
            return beside

    pointer = Pointer(model="films", version=A, epoch=1, path=f"films/{A}", sha256="0" * 64, created=1.0)
    log = Counted()
    tell(log, pointer)
    assert Counted.closed == 1
    log.down()
    with pytest.raises(Exception, match="down"):
        tell(log, pointer)
    assert Counted.closed == 2
