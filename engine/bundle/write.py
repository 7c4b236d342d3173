"""Writes a bundle so that it is there whole or not at all: a folder beside it, fsync, rename."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
import yaml
from torch import Tensor

from engine.bundle.manifest import FileEntry, PluginEntry, content_version, library_versions, sealed
from engine.bundle.open import DRIFT, OPTIMIZER, Bundle
from engine.bundle.tensors import save_tensors
from engine.components import UserState
from engine.config import Config, components
from engine.errors import BundleError
from engine.files import sha256, sync
from engine.plugins import Plugins, installed
from engine.streaming.learning.drift import reference
from engine.training.calibration import Calibration

if TYPE_CHECKING:
    from engine.data.prepare import Prepared
    from engine.model import RankingModel
    from engine.training.retrieval import RetrievalResult

USERS = pa.schema(
    [
        ("user", pa.string()),
        ("features", pa.string()),  # JSON: raw values of any type by feature name
        ("history", pa.list_(pa.string())),
        ("times", pa.list_(pa.int64())),
        ("seen", pa.list_(pa.string())),
    ]
)
USERS_A_BATCH = 8192


def write_bundle(
    path: Path,
    *,
    config: Config,
    model: RankingModel,
    prepared: Prepared,
    calibration: Mapping[str, Calibration],
    metrics: Mapping[str, Any],
    retrieval: RetrievalResult | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    parent: str | None = None,
    with_users: bool = True,
    replace: bool = False,
    prove: Callable[[Bundle], None] | None = None,
    plugins: Plugins | None = None,
) -> Bundle:
    """Writes a frozen model with everything that scoring needs; verified, then put in place by one rename.

    parent: version of the bundle that this one grew from. metrics: figures that JSON can hold.
    optimizer: the optimizers' state with these weights, so that learning can go on from the bundle.
    with_users: also what is known of each user, so that a server can start with their histories.
    replace: a bundle that is at `path` makes way (moved aside, the new one renamed in, then deleted; whoever has the
        old one mapped goes on reading it). Without it, and for anything that is no bundle, an existing path is refused.
    prove: called with the verified bundle before it is put in place; what it raises leaves the path as it was.
    Raises BundleError: path taken, numbers not finite, disk full. Nothing is left at `path` then; a kill leaves at most
    a hidden folder `.NAME.tmp-*` beside it, which may be deleted.
    """

    def parts(folder: Path) -> None:
        _write_parts(folder, config, model, prepared, calibration, retrieval, optimizer, with_users)

    return assemble(
        path, parts, config=config, metrics=metrics, parent=parent, replace=replace, prove=prove, plugins=plugins
    )


def assemble(
    path: Path,
    write_parts: Callable[[Path], None],
    *,
    config: Config,
    metrics: Mapping[str, Any],
    parent: str | None = None,
    replace: bool = False,
    prove: Callable[[Bundle], None] | None = None,
    plugins: Plugins | None = None,
) -> Bundle:
    """`write_bundle` with the files of `write_parts`, called with an empty folder; the manifest is made here."""
    path = Path(path).absolute()
    check_free(path, replace=replace)
    plugins = installed() if plugins is None else plugins
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_parts(temporary)
        _write_manifest(temporary, config, metrics, parent, plugins)
        _sync_tree(temporary)
        verified = Bundle.open(temporary)
        if prove is not None:
            prove(verified)
        _put(temporary, path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.open(path, verify=False)


def check_free(path: Path, *, replace: bool = False) -> None:
    """BundleError if a bundle cannot be written at `path`; asked before a long training, too."""
    if not (path.exists() or path.is_symlink()):
        return
    if not replace:
        raise BundleError(f"{path} exists; choose another folder or remove it (bundles are never changed in place)")
    if path.is_symlink() or not (path / "manifest.json").is_file():
        raise BundleError(f"{path} exists and is no bundle; choose another folder or remove it")


def _write_parts(
    folder: Path,
    config: Config,
    model: RankingModel,
    prepared: Prepared,
    calibration: Mapping[str, Calibration],
    retrieval: RetrievalResult | None,
    optimizer: Mapping[str, Tensor] | None,
    with_users: bool,
) -> None:
    stated = config.model_dump(mode="json", exclude_unset=True)  # as it was written: defaults of other kinds are errors
    text = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    save_tensors(folder / "model.safetensors", model.state_dict())
    fitted = {k: v for task, c in calibration.items() for k, v in c.to_tensors(f"{task}.").items()}
    save_tensors(folder / "calibration.safetensors", fitted)
    save_tensors(folder / "features.safetensors", prepared.numeric.to_tensors())
    save_tensors(folder / "statistics.safetensors", _statistics(prepared))
    save_tensors(folder / DRIFT, reference(prepared).to_tensors())
    (folder / "catalogue").mkdir()
    prepared.catalogue.save(folder / "catalogue")
    if with_users:
        _write_users(folder / "users.arrow", prepared.users())
    if optimizer is not None:
        save_tensors(folder / OPTIMIZER, optimizer)
    if retrieval is not None:
        save_tensors(folder / "retrieval.safetensors", retrieval.model.state_dict())
        save_tensors(folder / "vectors.safetensors", {"vectors": torch.as_tensor(retrieval.item_vectors)})


def _statistics(prepared: Prepared) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for space, statistics in prepared.statistics.items():
        tensors |= statistics.to_tensors(f"space.{space}")
    tensors["item_counts"] = torch.as_tensor(prepared.item_counts, dtype=torch.int64)
    tensors["item_latest"] = torch.as_tensor(prepared.item_latest, dtype=torch.int64)
    return tensors


def _write_users(path: Path, users: Iterable[UserState]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, USERS) as writer:
        for some in _batches(iter(users), USERS_A_BATCH):
            columns = [
                pa.array([u.user for u in some], pa.string()),
                pa.array([json.dumps(u.features, ensure_ascii=False, default=_plain) for u in some], pa.string()),
                pa.array([u.history for u in some], pa.list_(pa.string())),
                pa.array([u.times for u in some], pa.list_(pa.int64())),
                pa.array([u.seen for u in some], pa.list_(pa.string())),
            ]
            writer.write_batch(pa.record_batch(columns, schema=USERS))


def _batches(users: Iterator[UserState], size: int) -> Iterator[list[UserState]]:
    while some := list(islice(users, size)):
        yield some


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays as JSON; text for the rest (dates)."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _write_manifest(
    folder: Path, config: Config, metrics: Mapping[str, Any], parent: str | None, plugins: Plugins
) -> None:
    files = {}
    for found in sorted(p for p in folder.rglob("*") if p.is_file()):
        shutil.copymode(folder / "config.yaml", found)  # safetensors lets only its owner read what it writes
        files[found.relative_to(folder).as_posix()] = FileEntry(sha256=sha256(found), bytes=found.stat().st_size)
    plain, schema = config.model_dump(mode="json"), config.schema_().model_dump(mode="json")
    used = used_plugins(config, plugins)
    manifest = sealed(
        {
            "name": config.name,
            "version": content_version(files, plain, schema, used),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": plain,
            "schema": schema,
            "seed": config.seed,
            "plugins": [p.model_dump() for p in used],
            "libraries": library_versions(),
            "metrics": json.loads(json.dumps(dict(metrics), default=_plain, allow_nan=False)),
            "parent": parent,
            "files": {name: entry.model_dump() for name, entry in files.items()},
        }
    )
    text = json.dumps(manifest.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def used_plugins(config: Config, plugins: Plugins) -> list[PluginEntry]:
    """The components that a configuration names, each once, with their distributions."""
    named = {(kind, value.name) for _, kind, value in components(config) if value is not None}
    entries = []
    for kind, name in sorted(named):
        distribution, version = plugins.origin(kind, name)
        entries.append(PluginEntry(kind=kind, name=name, distribution=distribution, version=version))
    return entries


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _put(temporary: Path, path: Path) -> None:
    """Renames into place. An old bundle is moved aside first and comes back if the new one cannot take its place."""
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old-{uuid.uuid4().hex[:12]}")
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
