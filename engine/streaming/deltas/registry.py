"""Versions of models on disk, and which one is served.

ROOT/<model>/<version>/     a bundle, never changed once it is there
ROOT/<model>/current.json   the pointer to the one that is served (`engine.streaming.deltas.pointer`)
ROOT/<model>/epoch          the greatest epoch that was given out
"""

from __future__ import annotations

import math
import re
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine.bundle import Bundle, Manifest, read_manifest
from engine.bundle import diff as differences
from engine.config import NAME
from engine.errors import BundleError
from engine.files import link, sha256, sync, write_whole
from engine.streaming.deltas.lease import locked
from engine.streaming.deltas.pointer import MOST_HISTORY, Pointer, decode_pointer
from engine.streaming.deltas.versions import Version, describe

_VERSION = re.compile(r"[0-9a-f]{12}")
POINTER = "current.json"


class ModelRegistry:
    """The versions of one model; safe from many processes (a lock on a file).

    model: may be left out where the folder holds one model only. All methods raise BundleError for what is no version,
    no bundle or cannot be written; what was current stays current then.
    """

    def __init__(self, root: Path | str, model: str | None = None) -> None:
        self.root = Path(root)
        if model is not None:
            _check_name(model)
        self._named = model
        self._read: tuple[tuple[int, ...], Pointer] | None = None

    # ---------------------------------------------------------------------------------------------- looking
    @property
    def model(self) -> str:
        """The model's name; BundleError where there are several, or none yet."""
        if self._named is None:
            found = models(self.root)
            if len(found) != 1:
                several = f"holds {', '.join(found)}: name one" if found else "holds no model yet; promote a bundle"
                raise BundleError(f"{self.root}: {several}")
            self._named = found[0]
        return self._named

    @property
    def known(self) -> bool:
        """Whether there is a model of a known name."""
        return self._named is not None or len(models(self.root)) == 1

    @property
    def folder(self) -> Path:
        return self.root / self.model

    def current(self) -> Pointer | None:
        """What is served; None where nothing was promoted yet. Read again only when the file was replaced."""
        if not self.known:
            return None
        path = self.folder / POINTER
        try:
            status = path.stat()
            mark = (status.st_ino, status.st_mtime_ns, status.st_size)
            read = self._read
            if read is not None and read[0] == mark:
                return read[1]
            pointer = decode_pointer(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}") from None
        if pointer.model != self.model:
            raise BundleError(f"{path}: is of model {pointer.model}, in the folder of {self.model}")
        self._read = (mark, pointer)
        return pointer

    def bundle(self, version: str) -> Path:
        """The folder of a version that is there; `current` is the one that is served."""
        if version == "current":
            version = self._needed().version
        if not _VERSION.fullmatch(version):
            raise BundleError(f"'{version[:100]}' is no version: twelve hexadecimal digits (`plexrank models list`)")
        path = self.folder / version
        if path.is_symlink() or not (path / "manifest.json").is_file():
            raise BundleError(f"{self.root}: there is no version {version} of {self.model} (`plexrank models list`)")
        return path

    def versions(self) -> list[Version]:
        """All versions, oldest first; one that cannot be read is there with its problem."""
        pointer = self.current()
        found = [describe(self.folder / name, pointer) for name in self._there()]
        return sorted(found, key=lambda v: (v.created or "", v.version))

    def diff(self, a: str, b: str) -> dict[str, Any]:
        """What differs between two versions, as `engine.bundle.diff` says it."""
        return differences(self.bundle(a), self.bundle(b))

    # ---------------------------------------------------------------------------------------------- changing
    def publish(
        self,
        bundle: Path,
        epoch: int,
        reason: str,
        *,
        positions: Mapping[int, int] | None = None,
        stream: str = "",
    ) -> Pointer:
        """Takes a bundle in and makes it current. The bundle stays where it is, too (files are linked, or copied).

        epoch: BundleError where the pointer has a greater one (a rollback or a promotion came between), or is pinned.
        positions: of the stream of deltas named `stream`, from which this bundle's chain goes on.
        """
        manifest = read_manifest(Path(bundle))
        self._take_name(manifest)
        with self._locked():
            old = self.current()
            if old is not None and old.pinned:
                raise BundleError(f"{self.model} is pinned to {old.version}; unpin it to publish another version")
            if old is not None and epoch < old.epoch:
                raise BundleError(
                    f"{self.model}: epoch {epoch} was left: {old.version} is current since epoch {old.epoch} "
                    f"({old.reason or 'no reason given'}); begin anew from it"
                )
            self._take_in(Path(bundle), manifest)
            return self._point(manifest.version, epoch, reason, old, positions=positions or {}, stream=stream)

    def take_in(self, bundle: Path) -> str:
        """Takes a bundle in, every file checked, without making it current -> its version."""
        Bundle.open(Path(bundle))
        manifest = read_manifest(Path(bundle))
        self._take_name(manifest)
        with self._locked():
            self._take_in(Path(bundle), manifest)
        return manifest.version

    def promote(self, version: str, *, reason: str = "promoted", pin: bool = False) -> Pointer:
        """Makes a version current that is there; every file of it is checked first. The epoch grows."""
        Bundle.open(self.bundle(version))
        with self._locked():
            return self._point(self.bundle(version).name, self._grown(), reason, self._before(), pinned=pin)

    def rollback(
        self, to: str | None = None, *, reason: str = "rolled back", pin: bool = False, keep_pinned: bool = False
    ) -> Pointer:
        """Goes back to the version that was current before, or to one by name. The epoch grows.

        The version that is left is not gone back to later, unless it is promoted again. A pinned one is only left by
        name (`to`); with keep_pinned it is never left: the chain begins anew from it, whatever `to` says.
        """
        with self._locked():
            old = self._needed()
            if old.pinned and keep_pinned:
                to, pin = old.version, True
            if old.pinned and to is None:
                raise BundleError(f"{self.model} is pinned to {old.version}; unpin it, or name the version to go to")
            there = set(self._there())
            history = [v for v in old.history if v != old.version and v in there]
            if to is None and not history:
                raise BundleError(f"{self.model}: no version was current before {old.version}: nothing to go back to")
            goal = self.bundle(history[-1] if to is None else to)
            Bundle.open(goal)
            kept = history[: history.index(goal.name)] if goal.name in history else history
            return self._point(goal.name, self._grown(), reason, old, pinned=pin, history=kept)

    def renew(self, reason: str) -> Pointer:
        """Goes back to the current bundle without its deltas: for a learner that begins anew from it."""
        with self._locked():
            old = self._needed()
            return self._point(old.version, self._grown(), reason, old, pinned=old.pinned)

    def pin(self, *, reason: str = "pinned") -> Pointer:
        """Serves exactly the current bundle, without deltas, until `unpin`: the epoch grows, so all go back to it.

        What is pinned already stays as it is, as `unpin` does with what is not.
        """
        with self._locked():
            old = self._needed()
            if old.pinned:
                return old
            return self._point(old.version, self._grown(), reason, old, pinned=True)

    def unpin(self, *, reason: str = "unpinned") -> Pointer:
        """Lets learners publish again: what they learned from the pinned bundle is served after it."""
        with self._locked():
            old = self._needed()
            if not old.pinned:
                return old
            return self._point(
                old.version, old.epoch, reason, old, pinned=False, positions=old.positions, stream=old.stream
            )

    def new_epoch(self) -> int:
        """An epoch that no chain had before: for a learner that begins a chain anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            return self._grown()

    def prune(self, keep: int, spare: Collection[str] = ()) -> list[str]:
        """Removes all but the `keep` newest versions -> the removed. The current one stays, the one before it, and
        those of `spare`."""
        with self._locked():
            pointer = self.current()
            held = {*spare, *(() if pointer is None else (pointer.version, *pointer.history[-1:]))}
            found = [v.version for v in self.versions()]
            gone = [v for v in found[: max(0, len(found) - keep)] if v not in held]
            for version in gone:
                aside = self.folder / f".{version}.old-{uuid.uuid4().hex[:12]}"
                (self.folder / version).rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            return gone

    # ---------------------------------------------------------------------------------------------- helpers
    def _locked(self) -> Any:
        if not self.folder.is_dir():
            raise BundleError(f"{self.root}: there is no model {self.model} yet; promote a bundle")
        return locked(self.folder / ".lock")

    def _needed(self) -> Pointer:
        pointer = self.current()
        if pointer is None:
            raise BundleError(f"{self.root}: no version of {self.model} is current; promote one")
        return pointer

    def _before(self) -> Pointer | None:
        """The pointer that a promotion replaces; None for a damaged one, which it repairs."""
        try:
            return self.current()
        except BundleError:
            return None

    def _there(self) -> list[str]:
        folder = self.folder
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if _VERSION.fullmatch(p.name) and p.is_dir())

    def _take_name(self, manifest: Manifest) -> None:
        if self._named is None and not models(self.root):
            self._named = manifest.name
        if manifest.name != self.model:
            raise BundleError(f"{self.root}: is of model {self.model}; the bundle is of {manifest.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"{self.folder}: cannot be written: {error.strerror or error}") from None

    def _take_in(self, source: Path, manifest: Manifest) -> None:
        """The bundle under its version, whole or not at all."""
        goal = self.folder / manifest.version
        if goal.exists():
            if sha256(goal / "manifest.json") != sha256(source / "manifest.json"):
                Bundle.open(goal)  # equal contents, written at another time: those that are here stay
            return
        temporary = self.folder / f".{manifest.version}.tmp-{uuid.uuid4().hex[:12]}"
        try:
            for name in ("manifest.json", *manifest.files):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                link(source / name, temporary / name)
            Bundle.open(temporary, verify=False)
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            temporary.rename(goal)
            sync(self.folder)
        except OSError as error:
            raise BundleError(f"{goal}: cannot be written: {error.strerror or error}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _grown(self) -> int:
        """The next epoch, given out once; under the lock."""
        before = self._before()
        epoch = max(self._given(), 0 if before is None else before.epoch) + 1
        self._give(epoch)
        return epoch

    def _given(self) -> int:
        try:
            text = (self.folder / "epoch").read_text("ascii").strip()
            return int(text) if text.isdecimal() and len(text) < 19 else 0
        except (OSError, ValueError):
            return 0

    def _give(self, epoch: int) -> None:
        self._write("epoch", f"{epoch}\n".encode())

    def _point(
        self,
        version: str,
        epoch: int,
        reason: str,
        old: Pointer | None,
        *,
        pinned: bool = False,
        positions: Mapping[int, int] | None = None,
        stream: str = "",
        history: list[str] | None = None,
    ) -> Pointer:
        if history is None:
            before = [] if old is None else [*old.history, *([old.version] if old.version != version else [])]
            history = [v for n, v in enumerate(before) if v not in before[n + 1 :] and v != version][-MOST_HISTORY:]
        pointer = Pointer(
            model=self.model,
            version=version,
            epoch=epoch,
            path=f"{self.model}/{version}",
            sha256=sha256(self.bundle(version) / "manifest.json"),
            created=max(time.time(), math.nextafter(old.created, math.inf) if old is not None else 0.0),
            reason=reason[:1000],
            pinned=pinned,
            positions=dict(positions or {}),
            stream=stream,
            history=history,
            registry=old.registry if old is not None and old.registry else uuid.uuid4().hex,
        )
        if epoch > self._given():
            self._give(epoch)
        self._write(POINTER, pointer.encoded())
        return pointer

    def _write(self, name: str, contents: bytes) -> None:
        try:
            write_whole(self.folder / name, contents)
        except OSError as error:
            raise BundleError(f"{self.folder / name}: cannot be written: {error.strerror or error}") from None


def models(root: Path) -> list[str]:
    """The models in a registry's folder."""
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if re.fullmatch(NAME, p.name) and _is_model(p))


def _is_model(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / POINTER).is_file() or any(_VERSION.fullmatch(p.name) for p in folder.iterdir())
    )


def _check_name(model: str) -> None:
    if not re.fullmatch(NAME, model) or model.endswith("\n"):
        raise BundleError(f"'{model[:100]}' is no model's name: lower-case letters, digits and ._-")
