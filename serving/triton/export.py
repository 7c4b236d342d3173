"""A bundle as a version of a Triton model: proven in this process, and there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.bundle import Bundle, read_manifest
from engine.components import Scorer
from engine.config import NAME, ComponentConfig, default_name
from engine.config_triton import TritonConfig
from engine.errors import BundleError, ConfigError, PlexrankError
from engine.files import link, sync, write_whole
from engine.inference.signature import Signature
from engine.plugins import Plugins, installed
from engine.served import component
from engine.streaming.deltas.lease import locked
from serving.triton.config_pbtxt import ModelConfig
from serving.triton.layout import BUNDLE, CONFIG, MODEL, live_root, lock_of, version_numbers
from serving.triton.selftest_cases import made
from serving.triton.variant import Variant, build, check

COPIED = 64 << 20
"""Bytes. Smaller files of a bundle are copied. A larger one is linked where the disk can; then Triton may load the
version once more, beside itself, when another name of the file comes or goes, as it looks at a file's change time."""
PATIENCE = 600.0
"""Seconds that another who changes the repository may take."""


@dataclass(frozen=True)
class Exported:
    """model, number: where it is in Triton; version: the bundle's. new: this call wrote it; changed: `config.pbtxt`.

    others: older numbers that hold the same bundle.
    """

    model: str
    number: int
    version: str
    folder: Path
    new: bool
    changed: bool
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What is to be exported, as which model, with which settings.

    given: settings by name that go before all others. stated: those of a configuration; where None, those that the
    model in the repository has, or the bundle's own.
    """

    bundle: Path
    name: str | None = None
    given: Mapping[str, Any] | None = None
    stated: TritonConfig | None = None

    def settings(self, before: TritonConfig | None, own: TritonConfig) -> TritonConfig:
        """ConfigError for a value that cannot be."""
        stated = self.stated or before or own
        try:
            return TritonConfig.model_validate({**stated.model_dump(), **(self.given or {})})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"serving.triton.{where}: {first['input']!r}: {first['msg']}") from None


def export(wish: Wish, repository: Path, plugins: Plugins | None = None) -> Exported:
    """Adds the bundle as the model's next version; does nothing where the newest version holds it.

    The bundle is verified whole, its scores by tensors are compared with the in-process scorer's. Raises BundleError,
    SchemaError for a feature that no tensor can be named by, ConfigError, PlexrankError for a repository that cannot be
    written; nothing is left of the version then. Whatever serves the repository notices when it is told to load.
    """
    with changing(repository):
        return export_locked(wish, repository, plugins)


@contextmanager
def changing(repository: Path) -> Iterator[None]:
    """One at a time. PlexrankError where the repository cannot be written, or another takes too long."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlexrankError(f"{repository}: cannot be written: {error.strerror or error}") from None
    with locked(lock_of(repository), PATIENCE):
        yield


def export_locked(wish: Wish, repository: Path, plugins: Plugins | None = None) -> Exported:
    """`export`, by one who holds `changing`."""
    bundle = Bundle.open(wish.bundle)
    model = wish.name or bundle.name
    if not re.fullmatch(NAME, model):
        raise ConfigError(f"--name: '{model[:100]}' is no model's name: lower-case letters, digits and ._-")
    folder = repository / model
    numbers, config = version_numbers(folder), folder / CONFIG
    before = ModelConfig.read(config) if config.exists() else None
    settings = wish.settings(None if before is None else before.settings, bundle.config.serving.triton)
    wanted = ModelConfig.of(Signature.of(bundle.schema), settings)
    merged = wanted if before is None else before.with_more(wanted)
    variant = Variant.wished(settings)
    held = [n for n in numbers if held_by(folder / str(n)) == bundle.version and _alike(folder / str(n), variant)]
    with _writing(folder):
        if held and held[-1] == numbers[-1]:
            number, new = numbers[-1], False
            changed = _put_config(config, before, merged, model)
        else:
            number, new = _next(repository, settings, model, numbers), True
            with aside(repository, model) as place:
                _write_version(place / str(number), bundle, plugins or installed(), settings)
                changed = before != merged
                _put(place, folder, number, config, merged.text(model) if changed else None)
    others = tuple(n for n in held if n != number)
    return Exported(model, number, bundle.version, folder / str(number), new, changed, others)


def held_by(version: Path) -> str | None:
    """The version of the bundle in a version's folder; None where none can be read."""
    try:
        return read_manifest(version / BUNDLE).version
    except BundleError:
        return None


def _alike(version: Path, variant: Variant) -> bool:
    """Whether a version scores as that variant does."""
    try:
        return Variant.read(version).same(variant)
    except BundleError:
        return False


def _next(repository: Path, settings: TritonConfig, model: str, numbers: list[int]) -> int:
    """A number that was not used: not even by a version of which only the live memory is left."""
    lived = version_numbers(live_root(repository, settings.live) / model)
    return max([0, *numbers, *lived]) + 1


def _write_version(folder: Path, bundle: Bundle, plugins: Plugins, settings: TritonConfig) -> None:
    """All that Triton needs of a version. BundleError where tensors score otherwise than the in-process scorer."""
    (folder / BUNDLE).mkdir(parents=True)
    for name in ("manifest.json", *bundle.manifest.files):
        goal = folder / BUNDLE / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        source = bundle.path / name
        (link if source.stat().st_size > COPIED else shutil.copyfile)(source, goal)
    template = files("serving.triton") / "model_template" / MODEL
    (folder / MODEL).write_text(template.read_text("utf-8"), "utf-8")
    # A file in the place of Python's cache: what would be written there later makes Triton load the version again.
    (folder / "__pycache__").touch()
    scorer: Scorer = component(plugins, "scorers", ComponentConfig(name=default_name("scorers")))
    scorer.load(folder / BUNDLE)
    copied = Bundle.open(folder / BUNDLE, verify=False)
    test = made(copied, scorer)
    try:
        test.run_all(scorer.infer)
    except PlexrankError as error:
        raise BundleError(f"{bundle.path}: scores by tensors are not the scorer's: {error}") from error
    variant = build(Variant.wished(settings), folder, copied, plugins, settings.threads)
    test = replace(test, tolerance=variant.tolerance)
    if not variant.plain:
        check(variant, folder, folder.with_name("live"), copied, scorer, test, settings.item_vectors_mb)
    test.write(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _put(place: Path, folder: Path, number: int, config: Path, text: str | None) -> None:
    """Into the repository, by one rename; `config.pbtxt` first, as what is there already can live with it."""
    if not folder.exists():
        (place / CONFIG).write_text(text or "", "utf-8")
        place.chmod(0o755)
        place.rename(folder)
        sync(folder.parent)
        return
    if text is not None:
        write_whole(config, text.encode())
    (place / str(number)).rename(folder / str(number))
    sync(folder)


def _put_config(config: Path, before: ModelConfig | None, merged: ModelConfig, model: str) -> bool:
    if before == merged:
        return False
    write_whole(config, merged.text(model).encode())
    return True


@contextmanager
def aside(repository: Path, model: str) -> Iterator[Path]:
    """A folder on the repository's disk that Triton does not look into: beside the repository, or where nothing may be
    written there, in the model's folder. Removed at the end, with what is in it, and with what a kill left there."""
    repository = Path(os.path.abspath(repository))
    beside = repository.parent
    name = f".{repository.name}.tmp-"
    if not os.access(beside, os.W_OK) or beside.stat().st_dev != repository.stat().st_dev:
        beside, name = repository / model, ".tmp-"
    for left in beside.glob(f"{name}*"):
        shutil.rmtree(left, ignore_errors=True)
    place = beside / f"{name}{uuid.uuid4().hex[:12]}"
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PlexrankError(f"{folder}: cannot be written: {error.strerror or error}") from error
