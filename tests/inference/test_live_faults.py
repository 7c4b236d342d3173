"""Live memory where a writer is killed, several come first at once, a disk is full: real processes, real signals."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.tensors import load_tensors
from engine.errors import PlexrankError
from engine.inference import live_making, live_writer
from engine.inference.live import LiveModel
from engine.inference.live_files import Generation
from engine.inference.live_state import Record, StatePage
from engine.inference.live_writer import LiveWriter
from engine.streaming.deltas import apply
from engine.streaming.deltas.delta import parsed
from tests.inference.live_world import chain, check_equal, die, ended, fork, scored, scores
from tests.scorers.conftest import REQUESTS, delta, loaded

State = dict[str, Tensor]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    bundle = Bundle.open(tiny_bundle)
    _ = bundle.encoder, bundle.catalogue  # read once, before processes are forked
    return bundle


@pytest.fixture(scope="module")
def weights(tiny_bundle: Path) -> State:
    return load_tensors(tiny_bundle / "model.safetensors")


# ------------------------------------------------------------------------------------- a writer that is killed
def _amid_rows() -> None:
    """After some of them."""
    write = apply.write_rows

    def some(model: torch.nn.Module, parts: dict, *, pause: bool) -> None:
        write(model, dict(list(parts.items())[:1]), pause=pause)
        die()

    live_writer.write_rows = some


def _amid_vectors() -> None:
    live_writer.LiveWriter._renewed = lambda *_: die()


def _amid_dense() -> None:
    write = Generation.write_dense

    def half(self: Generation, slot: int, data: bytes) -> None:
        write(self, slot, data[: len(data) // 2])
        die()

    Generation.write_dense = half


def _amid_record() -> None:
    """Half of its bytes are new."""

    def half(self: StatePage, record: Record) -> None:
        from engine.inference.live_state import _packed, _place

        at, packed = _place(record.number), _packed(record)
        self._memory[at : at + 20] = packed[:20]
        die()

    StatePage.write = half


def _after_record() -> None:
    write = StatePage.write

    def last(self: StatePage, record: Record) -> None:
        write(self, record)
        die()

    StatePage.write = last


@pytest.mark.parametrize(
    ("point", "rows_were_begun"),
    [(_amid_rows, True), (_amid_vectors, True), (_amid_dense, False), (_amid_record, True), (_after_record, True)],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_after_a_writer_is_killed_readers_score_on_and_the_next_one_makes_it_whole(
    bundle: Bundle, weights: State, tmp_path: Path, point: Callable[[], None], rows_were_begun: bool
) -> None:
    """Where rows were being written, from the bundle on; else from the version that is there."""
    deltas = chain(bundle.path, weights, 4)
    live = LiveModel.open(tmp_path, bundle)

    def writer() -> None:
        with LiveWriter(tmp_path, bundle) as first:
            first.apply(deltas[0])
            point()
            first.apply(deltas[1])

    assert ended(fork(writer)) == KILLED
    assert live.refresh()
    assert live.version == deltas[1 if point is _after_record else 0].version
    assert all(np.isfinite(scores(live.now, request)).all() for request in REQUESTS)
    late = LiveModel.open(tmp_path, bundle)  # one that comes before the next writer does
    assert late.version == live.version
    with LiveWriter(tmp_path, bundle) as second:
        assert second.version == (bundle.version if rows_were_begun else deltas[0].version)
        for reader in (live, late):
            reader.refresh()
            check_equal(reader, scored(loaded(bundle.path), [] if rows_were_begun else deltas[:1]))
        for one in deltas[parsed(second.version)[2] :]:
            second.apply(one)
    for reader in (live, late):
        reader.refresh()
        check_equal(reader, scored(loaded(bundle.path), deltas))
    assert len(list(tmp_path.glob("gen-*"))) == 1


def _amid_generation() -> None:
    live_making.check = lambda *_: die()


def _before_its_record() -> None:
    live_writer.Record.of = lambda *_, **__: die()


def _before_old_is_removed() -> None:
    live_writer.remove_others = lambda *_: die()


@pytest.mark.parametrize("point", [_amid_generation, _before_its_record, _before_old_is_removed])
def test_a_writer_that_is_killed_at_a_new_generation_leaves_the_old_one_or_the_new_one(
    bundle: Bundle, weights: State, tmp_path: Path, point: Callable[[], None]
) -> None:
    old, new = chain(bundle.path, weights, 2), chain(bundle.path, weights, 2, epoch=1)
    live = LiveModel.open(tmp_path, bundle)

    def writer() -> None:
        with LiveWriter(tmp_path, bundle) as first:
            for one in old:
                first.apply(one)
            point()
            first.apply(new[0])

    assert ended(fork(writer)) == KILLED
    went = point is _before_old_is_removed
    wanted = scored(loaded(bundle.path), new[:1] if went else old)
    assert live.refresh()
    check_equal(live, wanted)
    with LiveWriter(tmp_path, bundle) as second:
        assert second.version == wanted.version
        assert len(list(tmp_path.glob("gen-*"))) == 1  # what was left is gone
        for one in new:
            second.apply(one)
    live.refresh()
    check_equal(live, scored(loaded(bundle.path), new))
    assert len(list(tmp_path.glob("gen-*"))) == 1


def test_a_writer_that_is_killed_at_any_moment_costs_nothing_but_what_it_did_not_write(
    bundle: Bundle, weights: State, tmp_path: Path
) -> None:
    """Fifteen writers, each killed at some moment; the version is always one that was announced, and its scores its."""
    deltas = chain(bundle.path, weights, 12)
    scorers = [loaded(bundle.path)]
    for n in range(1, 13):
        scorers.append(scored(loaded(bundle.path), deltas[:n]))
    live, random = LiveModel.open(tmp_path, bundle), np.random.default_rng(5)

    def writer() -> None:
        with LiveWriter(tmp_path, bundle) as one:
            while True:
                for each in deltas[parsed(one.version)[2] :]:
                    one.apply(each)
                one.begin_anew()

    for _ in range(15):
        child = fork(writer)
        time.sleep(0.05 + float(random.uniform(0, 0.15)))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == KILLED
        live.refresh()
        assert live.trouble is None
        if not StatePage.open(tmp_path, bundle).dirty:
            check_equal(live, scorers[parsed(live.version)[2]])
    with LiveWriter(tmp_path, bundle) as last:
        for each in deltas[parsed(last.version)[2] :]:
            last.apply(each)
    live.refresh()
    check_equal(live, scorers[12])
    assert len(list(tmp_path.glob("gen-*"))) == 1


# ------------------------------------------------------------------------------------- who comes first
def test_of_several_that_come_at_once_one_makes_the_memory_and_all_score_with_it(
    bundle: Bundle, tmp_path: Path
) -> None:
    make = live_making.make

    def told(*arguments: object) -> object:
        with (tmp_path / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return make(*arguments)

    def instance() -> None:
        live_making.make = told
        live = LiveModel.open(tmp_path / "live", bundle)
        np.save(tmp_path / f"scores-{os.getpid()}.npy", scores(live.now, REQUESTS[0]))

    children = [fork(instance) for _ in range(5)]
    assert [ended(child) for child in children] == [0] * 5
    assert len((tmp_path / "made").read_text().split()) == 1
    wanted = loaded(bundle.path).score(REQUESTS[0]).tasks["liked"]
    for child in children:
        np.testing.assert_array_equal(np.load(tmp_path / f"scores-{child}.npy"), wanted)


def test_where_the_first_is_killed_while_it_makes_the_memory_the_next_one_does(bundle: Bundle, tmp_path: Path) -> None:
    def first() -> None:
        _amid_generation()
        LiveModel.open(tmp_path, bundle)

    assert ended(fork(first)) == KILLED
    assert list(tmp_path.glob("gen-*"))  # half of one
    check_equal(LiveModel.open(tmp_path, bundle), loaded(bundle.path))
    assert [path.name for path in tmp_path.glob("gen-*")] == ["gen-1"]


# ------------------------------------------------------------------------------------- disks and permissions
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """512 KiB: a generation takes some 200."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _filled(folder: Path, leave: int) -> Path:
    """A file that takes all but some bytes."""
    free = os.statvfs(folder)
    path = folder / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - leave)
    return path


def test_a_full_disk_is_said_with_its_folder_and_leaves_nothing_half_made(
    bundle: Bundle, weights: State, small_disk: Path
) -> None:
    live_folder = small_disk / "live"
    filler = _filled(small_disk, 100_000)
    for open_ in (LiveModel.open, LiveWriter):
        with pytest.raises(
            PlexrankError, match=rf"{live_folder}: cannot be made: No space left on device.*room for two"
        ):
            open_(live_folder, bundle)
        assert not list(live_folder.glob("gen-*"))
        assert not (live_folder / "state").exists()
    filler.unlink()
    live = LiveModel.open(live_folder, bundle)
    one, two, *_ = chain(bundle.path, weights, 2)
    with LiveWriter(live_folder, bundle) as writer:
        filler = _filled(small_disk, 8192)
        for each in (one, two):
            writer.apply(each)  # in what is allocated
        anew = delta(bundle.path, 1, epoch=1)
        with pytest.raises(PlexrankError, match=rf"{live_folder}: delta .*\+1\.1 cannot be written: No space left"):
            writer.apply(anew)
        assert [path.name for path in live_folder.glob("gen-*")] == ["gen-1"]
        assert live.refresh()
        check_equal(live, scored(loaded(bundle.path), [one, two]))
        filler.unlink()
        live.close()
        writer.apply(anew)
    check_equal(LiveModel.open(live_folder, bundle), scored(loaded(bundle.path), [anew]))


def test_files_that_may_not_grow_are_a_full_disk_too(bundle: Bundle, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    try:
        with pytest.raises(PlexrankError, match=rf"{tmp_path}: cannot be made: File too large"):
            LiveModel.open(tmp_path, bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.glob("gen-*"))
    check_equal(LiveModel.open(tmp_path, bundle), loaded(bundle.path))


def test_a_folder_that_cannot_be_written_to_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for open_ in (LiveModel.open, LiveWriter):
        with pytest.raises(PlexrankError, match=rf"{tmp_path}/file/live: cannot be opened: Not a directory"):
            open_(tmp_path / "file" / "live", bundle)

    def nobody() -> None:
        os.setgroups([]) if os.geteuid() == 0 else None
        os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None
        for open_ in (LiveModel.open, LiveWriter):
            with pytest.raises(PlexrankError, match=r"live: cannot be .*Permission denied|live.*: cannot be locked"):
                open_(tmp_path / "live", bundle)

    (tmp_path / "live").mkdir()
    (tmp_path / "live").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    assert ended(fork(nobody)) == 0


@pytest.mark.parametrize("name", ["tables", "items", "layout.json", "dense-0", "state"])
def test_a_file_that_was_cut_off_is_named_or_made_anew(bundle: Bundle, tmp_path: Path, name: str) -> None:
    LiveModel.open(tmp_path, bundle).close()
    path = tmp_path / name if name == "state" else tmp_path / "gen-1" / name
    path.write_bytes(path.read_bytes()[:100])
    if name == "state":
        check_equal(LiveModel.open(tmp_path, bundle), loaded(bundle.path))
        return
    with pytest.raises(PlexrankError, match=str(tmp_path)):
        LiveModel.open(tmp_path, bundle)
    with LiveWriter(tmp_path, bundle):
        check_equal(LiveModel.open(tmp_path, bundle), loaded(bundle.path))
