"""Versions on disk and the pointer to the one that is served: whole, guarded, and never lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import BundleError
from engine.streaming.deltas.lease import Lease, locked
from engine.streaming.deltas.registry import ModelRegistry, models
from tests.streaming.small_bundles import A, B, C, write_small


@pytest.fixture
def bundles(tmp_path) -> dict[str, Path]:
    return {
        v: write_small(tmp_path / f"bundle-{n}", v, weight=n, created=f"2025-01-0{n + 1}", parent=parent)
        for n, (v, parent) in enumerate(((A, None), (B, A), (C, B)))
    }


@pytest.fixture
def registry(tmp_path, bundles) -> ModelRegistry:
    """Three versions, the third current; epochs 1, 2, 3."""
    registry = ModelRegistry(tmp_path / "models")
    for epoch, (version, path) in enumerate(bundles.items(), 1):
        registry.publish(path, epoch, f"published {version[0]}")
    return registry


def test_a_published_bundle_is_current_and_the_original_stays(registry, bundles):
    current = registry.current()
    assert (current.model, current.version, current.epoch, current.reason) == ("films", C, 3, "published c")
    assert registry.bundle(C) == registry.root / "films" / C
    assert (bundles[C] / "manifest.json").is_file()
    assert current.history == [A, B]
    raw = json.loads((registry.folder / "current.json").read_text())
    assert raw["path"] == f"films/{C}"


def test_versions_come_oldest_first_with_their_figures_and_marks(registry):
    found = registry.versions()
    assert [(v.version, v.parent, v.auc, v.logloss) for v in found] == [
        (A, None, 0.7, 0.5),
        (B, A, 0.7, 0.5),
        (C, B, 0.7, 0.5),
    ]
    assert [v.current for v in found] == [False, False, True]
    assert [v.created for v in found] == ["2025-01-01", "2025-01-02", "2025-01-03"]


def test_a_rollback_goes_to_the_version_before_and_the_epoch_grows(registry):
    back = registry.rollback(reason="worse")
    assert (back.version, back.epoch, back.reason) == (B, 4, "worse")
    assert registry.rollback().version == A  # and once more: not to and fro between two
    with pytest.raises(BundleError, match="nothing to go back to"):
        registry.rollback()


def test_a_version_that_was_rolled_back_from_is_not_gone_back_to(registry, tmp_path):
    registry.rollback()
    registry.publish(write_small(tmp_path / "d", "d" * 12), registry.new_epoch(), "next")
    assert registry.rollback().version == B
    assert registry.promote(C).history == [A, B]  # by name it may be served again


def test_a_rollback_may_name_its_goal(registry):
    assert registry.rollback(to=A).version == A
    with pytest.raises(BundleError, match="there is no version dddddddddddd"):
        registry.rollback(to="d" * 12)
    assert registry.current().version == A


def test_an_epoch_that_was_left_cannot_publish(registry, tmp_path):
    registry.rollback()  # epoch 4
    with pytest.raises(BundleError, match="epoch 3 was left"):
        registry.publish(write_small(tmp_path / "d", "d" * 12), 3, "a learner that did not hear of it")
    assert registry.current().version == B


def test_new_epochs_are_given_out_once_even_if_no_pointer_takes_them(registry):
    given = [registry.new_epoch() for _ in range(3)]
    assert given == [4, 5, 6]
    assert registry.promote(A).epoch == 7


def test_a_chain_is_begun_anew_from_the_same_version_pinned_or_not(registry):
    anew = registry.renew("a learner lost its checkpoint")
    assert (anew.version, anew.epoch, anew.history, anew.pinned) == (C, 4, [A, B], False)
    registry.pin()
    assert registry.renew("again").pinned


def test_nothing_is_published_over_a_pinned_version(registry, tmp_path):
    pinned = registry.pin()
    assert (pinned.version, pinned.pinned, pinned.epoch) == (C, True, 4)
    with pytest.raises(BundleError, match="pinned to cccccccccccc"):
        registry.publish(write_small(tmp_path / "d", "d" * 12), 9, "learner")
    with pytest.raises(BundleError, match="unpin it"):
        registry.rollback()
    free = registry.unpin()
    assert (free.version, free.pinned, free.epoch) == (C, False, 4)
    assert registry.publish(tmp_path / "d", 9, "learner").version == "d" * 12


def test_what_is_pinned_already_stays_as_it_is_and_so_does_what_is_not(registry):
    before = registry.current()
    assert registry.unpin() == before
    pinned = registry.pin(reason="an audit")
    assert registry.pin(reason="again") == registry.current() == pinned


def test_a_guard_begins_anew_from_what_is_pinned_wherever_it_wants_to_go(registry):
    pinned = registry.pin()
    held = registry.rollback(A, reason="guard: worse", keep_pinned=True)
    assert (held.version, held.pinned, held.epoch, held.history) == (C, True, pinned.epoch + 1, [A, B])
    registry.unpin()
    assert registry.rollback(A, keep_pinned=True).version == A


def test_pruning_keeps_the_newest_the_current_and_the_one_to_go_back_to(registry, tmp_path):
    for n, letter in enumerate("def"):
        path = write_small(tmp_path / letter, letter * 12, created=f"2025-02-0{n + 1}")
        registry.publish(path, 10 + n, "next")
    registry.rollback(to=B)  # history: a
    assert registry.prune(2) == [C, "d" * 12]
    assert [v.version for v in registry.versions()] == [A, B, "e" * 12, "f" * 12]
    assert registry.rollback().version == A


def test_a_bundle_that_is_edited_is_not_promoted(registry):
    file = registry.bundle(A) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.unlink()  # it shares its bytes with the bundle that it was published from
    file.write_bytes(raw)
    with pytest.raises(BundleError, match="edited or corrupted"):
        registry.promote(A)
    assert registry.current().version == C


def test_a_version_without_a_manifest_is_listed_with_its_problem(registry):
    (registry.folder / B / "manifest.json").unlink()
    found = {v.version: v.problem for v in registry.versions()}
    assert "no manifest.json" in found[B]
    assert found[C] is None


@pytest.mark.parametrize("version", ["../films", "", "A" * 12, "a" * 11, "a" * 12 + "\n", ".lock", "currently"])
def test_names_that_are_no_versions_are_refused(registry, version):
    for door in (registry.promote, registry.bundle, lambda v: registry.rollback(to=v), lambda v: registry.diff(v, A)):
        with pytest.raises(BundleError, match="no version"):
            door(version)


@pytest.mark.parametrize("model", ["../films", "", "a/b", "Films", "films\n", "a" * 65])
def test_names_that_are_no_models_are_refused(tmp_path, model):
    with pytest.raises(BundleError, match="no model's name"):
        ModelRegistry(tmp_path, model)


def test_a_link_in_place_of_a_version_is_refused(registry, tmp_path):
    shutil.rmtree(registry.folder / B)
    (registry.folder / B).symlink_to(tmp_path / "bundle-1")
    with pytest.raises(BundleError, match="there is no version b"):
        registry.promote(B)


def test_a_registry_of_two_models_wants_a_name(registry, tmp_path):
    ModelRegistry(registry.root, "books").publish(write_small(tmp_path / "x", A, name="books"), 1, "first")
    assert models(registry.root) == ["books", "films"]
    with pytest.raises(BundleError, match="books, films: name one"):
        _ = ModelRegistry(registry.root).model
    with pytest.raises(BundleError, match="is of model books; the bundle is of films"):
        ModelRegistry(registry.root, "books").publish(tmp_path / "bundle-0", 2, "wrong")
    assert ModelRegistry(registry.root, "films").current().version == C


def test_an_empty_registry_says_so(tmp_path):
    empty = ModelRegistry(tmp_path / "none")
    assert empty.current() is None
    for call in (empty.versions, empty.rollback, empty.pin, empty.new_epoch):
        with pytest.raises(BundleError, match="holds no model yet"):
            call()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no pointer"),
        ("{}", "missing required field"),
        ("[" * 50_000, "no pointer"),
        ('{"path": "films/../../etc"}', "leads to|required"),
    ],
)
def test_a_damaged_pointer_is_named_and_a_promotion_writes_it_anew(registry, text, says):
    whole = json.loads((registry.folder / "current.json").read_text())
    if text.startswith('{"path'):
        text = json.dumps(whole | json.loads(text))
    (registry.folder / "current.json").write_text(text)
    with pytest.raises(BundleError, match=says):
        registry.current()


def test_a_promotion_repairs_a_damaged_pointer(registry):
    (registry.folder / "current.json").write_text("half a poin")
    assert registry.promote(B).version == B
    assert registry.current().epoch == 4  # the epoch is kept beside it


def test_a_full_disk_leaves_the_old_pointer_and_nothing_else(registry, tmp_path, monkeypatch):
    """A limit on the length of files stands for the disk: writes fail the same way. Links would need no room."""
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    new = write_small(tmp_path / "d", "d" * 12)
    before = (registry.folder / "current.json").read_bytes()
    names = sorted(p.name for p in registry.folder.iterdir())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        with pytest.raises(BundleError, match="cannot be written"):
            registry.publish(new, 4, "learner")
        with pytest.raises(BundleError, match="cannot be written"):
            registry.promote(A)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (registry.folder / "current.json").read_bytes() == before
    assert sorted(p.name for p in registry.folder.iterdir()) == names
    assert registry.publish(new, 5, "again").version == "d" * 12


def test_a_copy_across_file_systems_is_whole(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    registry.publish(write_small(tmp_path / "d", "d" * 12), 4, "learner")
    found = {v.version: v.problem for v in registry.versions()}
    assert found["d" * 12] is None


def test_equal_contents_are_taken_in_once(registry, tmp_path):
    again = write_small(tmp_path / "again", A, created="2026-01-01")
    assert registry.publish(again, 4, "trained again").version == A
    assert len(registry.versions()) == 3
    assert registry.versions()[0].created == "2025-01-01"


def test_two_versions_are_compared(registry):
    found = registry.diff(A, "current")
    assert (found["a"]["version"], found["b"]["version"], found["same"]) == (A, C, False)
    assert found["tensors"] == {"model.safetensors:weight": {"max_abs": 2.0}}


def test_two_processes_that_promote_at_once_both_come_through_one_after_the_other(registry):
    script = (
        "import sys; from engine.streaming.deltas.registry import ModelRegistry\n"
        "r = ModelRegistry(sys.argv[1])\n"
        "for _ in range(10): r.promote(sys.argv[2])\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", script, str(registry.root)]
    children = [subprocess.Popen([*run, v], cwd=Path(__file__).parents[2]) for v in (A, B)]
    assert [child.wait() for child in children] == [0, 0]
    assert registry.current().epoch == 23  # 3 + 20: no promotion was lost, no epoch given out twice
    assert registry.current().version in (A, B)


def test_whoever_waits_too_long_for_the_lock_is_told(tmp_path):
    with (
        locked(tmp_path / ".lock"),
        pytest.raises(BundleError, match="another process is changing it"),
        locked(tmp_path / ".lock", timeout=0.05),
    ):
        pass


# ------------------------------------------------------------------------------------------------ leases
def test_a_second_publisher_is_refused_and_named_until_the_first_lets_go(tmp_path):
    lease = Lease(tmp_path / "publisher")
    with pytest.raises(BundleError, match=f"process {os.getpid()} on .* publishes this model already"):
        Lease(tmp_path / "publisher")
    lease.release()
    Lease(tmp_path / "publisher").release()


def test_a_lease_goes_with_its_process(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from engine.streaming.deltas.lease import Lease\n"
        "lease = Lease(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "publisher")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(BundleError, match=f"process {child.pid}"):
        Lease(tmp_path / "publisher")
    child.kill()
    child.wait()
    Lease(tmp_path / "publisher").release()


def test_a_holder_on_another_machine_is_respected_while_its_heart_beats(tmp_path):
    def holder(age: float) -> None:
        state = {"pid": 7, "host": "elsewhere", "heartbeat": time.time() - age, "token": "x"}
        (tmp_path / "publisher").write_text(json.dumps(state))

    holder(1.0)
    with pytest.raises(BundleError, match="process 7 on elsewhere"):
        Lease(tmp_path / "publisher")
    holder(600.0)
    lease = Lease(tmp_path / "publisher")
    holder(0.0)  # the other took it while this one slept
    with pytest.raises(BundleError, match="process 7 on elsewhere"):
        lease.check()
    lease.release()
