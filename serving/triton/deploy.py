"""Brings a bundle into a Triton that runs: as the next version beside the old, which serves until it answers."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BundleError, PlexrankError
from engine.files import write_whole
from engine.plugins import Plugins
from serving.triton.client import TritonClient, TritonError
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.export import Exported, Wish, aside, changing, export_locked
from serving.triton.layout import CONFIG, live_root, version_numbers
from serving.triton.selftest import SelfTest

log = logging.getLogger("plexrank.triton")

LOAD_SECONDS = 600.0
_ASK_SECONDS = 30.0
_END_SECONDS = 60.0
"""That requests of a version which makes way have to end, before its memory is removed."""


@dataclass(frozen=True)
class Deployed:
    """exported: where it is. seconds: until it answered; removed: numbers of versions that made way."""

    exported: Exported
    seconds: float
    removed: tuple[int, ...] = ()


def deploy(
    wish: Wish,
    repository: Path,
    client: TritonClient,
    plugins: Plugins | None = None,
    *,
    timeout: float = LOAD_SECONDS,
) -> Deployed:
    """Exports the bundle as the next version, has it loaded, and asks it; then the oldest versions make way.

    Where the newest version holds the bundle already, it is only seen to that it answers. An older bundle gets a number
    of its own again: who names no version is answered by the newest. Raises BundleError for a bundle that is not fit or
    that Triton refuses, TritonError where Triton does not answer; the versions that served go on, and of the new one
    nothing is left.
    """
    if not client.live():
        raise TritonError(f"{client.url}: no Triton answers; start it: plexrank triton up {repository}", "UNAVAILABLE")
    begin = time.monotonic()
    with changing(repository):
        config = repository / (wish.name or _name(wish)) / CONFIG
        before = config.read_bytes() if config.exists() else None
        exported = export_locked(wish, repository, plugins)
        try:
            _bring(exported, client, timeout)
        except PlexrankError as error:
            _take_back(exported, repository, before, client)
            if isinstance(error, TritonError) and error.silent:
                raise
            raise BundleError(f"{wish.bundle}: not deployed, what served goes on: {error}") from error
        seconds = time.monotonic() - begin
        return Deployed(exported, seconds, _pruned(exported, repository, client))


def _name(wish: Wish) -> str:
    from engine.bundle import read_manifest

    return read_manifest(wish.bundle).name


def _bring(exported: Exported, client: TritonClient, timeout: float) -> None:
    """Loads what is in the folder, beside what serves, and asks the version all of its self-test."""
    client.load(exported.model, timeout)
    number = str(exported.number)
    SelfTest.open(exported.folder).run_all(
        lambda inputs: client.infer(exported.model, inputs, number, timeout=_ASK_SECONDS)
    )


def _take_back(exported: Exported, repository: Path, before: bytes | None, client: TritonClient) -> None:
    """As it was: the version away, `config.pbtxt` as before; Triton, which may have begun to load it, hears of it."""
    folder = exported.folder.parent
    settings = ModelConfig.read(folder / CONFIG).settings
    if before is not None and exported.changed:
        write_whole(folder / CONFIG, before)
    if not exported.new:
        return
    if before is None:
        _remove(folder, repository, exported.model)
    else:
        _remove(exported.folder, repository, exported.model)
        try:
            client.load(exported.model, LOAD_SECONDS)
        except TritonError as error:
            log.warning("%s: %s", exported.model, error)
    live = live_root(repository, settings.live) / exported.model / str(exported.number)
    shutil.rmtree(live, ignore_errors=True)


def _pruned(exported: Exported, repository: Path, client: TritonClient) -> tuple[int, ...]:
    """Removes the folders and the live memory of versions that Triton has let go of."""
    folder = exported.folder.parent
    settings = ModelConfig.read(folder / CONFIG).settings
    numbers = version_numbers(folder)
    live = live_root(repository, settings.live) / exported.model
    old = [n for n in numbers if n not in numbers[-settings.versions :]]
    left = [n for n in version_numbers(live) if n not in numbers[-settings.versions :] and n < exported.number]
    if not old and not left:
        return ()
    _wait_for_end(exported.model, {*old, *left}, client)
    for number in old:
        _remove(folder / str(number), repository, exported.model)
    for number in left:
        shutil.rmtree(live / str(number), ignore_errors=True)
    return tuple(old)


def _wait_for_end(model: str, numbers: set[int], client: TritonClient) -> None:
    """Until Triton has none of these versions any more; what it does not say in time is logged."""
    until = time.monotonic() + _END_SECONDS
    try:
        while time.monotonic() < until:
            held = {v.version for v in client.index() if v.model == model and v.state in ("READY", "UNLOADING")}
            if not held & set(map(str, numbers)):
                return
            time.sleep(0.1)
        log.warning("%s: versions %s are still in use", model, sorted(numbers))
    except TritonError as error:
        log.warning("%s: %s", model, error)


def _remove(folder: Path, repository: Path, model: str) -> None:
    """Out of the repository at once, then from the disk."""
    with aside(repository, model) as place:
        folder.rename(place / folder.name)
