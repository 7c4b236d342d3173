"""Generations are made aside and renamed into place; the first one by whoever comes first, while others wait."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.bundle import Bundle
from engine.bundle.manifest import inside
from engine.bundle.tensors import misfits
from engine.errors import BundleError
from engine.files import link, sha256
from engine.inference.live_files import (
    ITEMS,
    LAYOUT,
    TABLES,
    Array,
    DensePart,
    Generation,
    ItemsLayout,
    Layout,
    allocate_arrays,
    allocate_dense,
    copy,
    copy_table,
    mapped,
    naming,
    placed,
)
from engine.inference.live_state import NAME, Record, StatePage
from engine.inference.live_view import LiveView, built, check, view_of
from engine.inference.quantised import Kind, row_bytes
from engine.item_side import HeldItems, ItemSide
from engine.model import RankingModel, build_model
from engine.plugins import Plugins
from engine.streaming.deltas import apply
from engine.streaming.deltas.delta import TableRows
from engine.streaming.deltas.lease import locked
from engine.tables import FrozenTables

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Source:
    """What a generation is made of. tables: float32 numbers, to be held as `kind`, or a generation that it shares them
    with."""

    tables: Mapping[str, Tensor] | Generation
    dense: DensePart
    kind: Kind = "float32"


@dataclass(frozen=True)
class Made:
    """A generation in its place, which no page names yet, and what scores over it; dense: as it is in slot 0."""

    generation: Generation
    view: LiveView
    dense: bytes


def generation_path(folder: Path, number: int) -> Path:
    return folder / f"gen-{number}"


def enter(folder: Path, bundle: Bundle, plugins: Plugins, most_bytes: int, timeout: float, kind: Kind) -> None:
    """Sees to it that there is a generation to map: makes the first one, from the bundle, or waits for who does.

    PlexrankError naming the folder where it cannot be made (a full disk, no permission) or another process takes longer
    than `timeout` seconds; BundleError where it is another bundle's, or the bundle's weights are not the manifest's.
    """
    with naming(folder, "cannot be opened"):
        folder.mkdir(parents=True, exist_ok=True)
        if _entered(folder, bundle):
            return
    with locked(folder / "create.lock", timeout), naming(folder, "cannot be made"):
        if _entered(folder, bundle):
            return
        remove_others(folder, None)
        for left in folder.glob(f".{NAME}.*"):
            left.unlink()
        source = bundle_source(bundle, plugins, kind)
        made = make(folder, 1, bundle, plugins, most_bytes, source, {}, bundle.version)
        StatePage.create(folder, bundle, Record.of(1, 1, made.dense))


def _entered(folder: Path, bundle: Bundle) -> bool:
    for _ in range(3):  # a writer may go on to the next generation meanwhile
        page = StatePage.open(folder, bundle)
        if page is None:
            return False
        if (generation_path(folder, page.read().generation) / LAYOUT).is_file():
            return True
    return False


def remove_others(folder: Path, current: int | None) -> None:
    """All generations but one. The names go at once, the memory when no process has it mapped any more."""
    for path in folder.glob("gen-*"):
        if current is None or path != generation_path(folder, current):
            shutil.rmtree(path, ignore_errors=True)


def bundle_source(bundle: Bundle, plugins: Plugins, kind: Kind) -> Source:
    """The bundle's weights, mapped. BundleError where they are not what the manifest says, or not of its model, or
    where there are no tables to quantise."""
    path = inside(bundle.path, _WEIGHTS)
    model = build_model(bundle.config, bundle.statistics, plugins, frozen=True, device=torch.device("meta"))
    try:
        if sha256(path) != bundle.manifest.files[_WEIGHTS].sha256:
            raise BundleError(f"{path}: edited or corrupted: its sha256 is not the manifest's; copy the bundle again")
        with safe_open(path, framework="pt", device="cpu") as file:
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from None
    wrong = misfits(model.state_dict(), state)
    if wrong:
        raise BundleError(f"{path}: {'; '.join(wrong[:3])}: written by another version of a plugin?")
    tables = {name: state.pop(f"{apply.TABLES}{name}") for name in apply.tables(model)}
    odd = [name for name, table in tables.items() if table.dtype != torch.float32 or table.dim() != 2]
    if odd:
        raise BundleError(f"{path}: table {odd[0]} is not float32 [rows, dim]: it cannot be changed while it serves")
    if kind == "int8":
        check_quantisable(bundle, model)
    return Source(tables, DensePart({name: tensor.clone() for name, tensor in state.items()}, bundle.calibration), kind)


def check_quantisable(bundle: Bundle, model: RankingModel) -> None:
    """BundleError where the embedding method has no tables."""
    if not isinstance(model.embedding, FrozenTables) or not apply.tables(model):
        raise BundleError(
            f"{bundle.path}: embedding '{bundle.config.embedding.name}' has no tables that could be held as int8; "
            "export it with float32 (serving.triton.tables)"
        )


def make(
    folder: Path,
    number: int,
    bundle: Bundle,
    plugins: Plugins,
    most_bytes: int,
    source: Source,
    rows: Mapping[str, TableRows],
    version: str,
) -> Made:
    """Makes `gen-<number>` and tries it. Whatever is wrong leaves none behind.

    most_bytes: for items' vectors; none are kept where they would be larger.
    rows: written into the tables before the items' vectors are made of them; they were checked.
    BundleError where it does not score; OSError, ENOSPC for one, where its files cannot be written.
    """
    path, goal = folder / f"gen-{number}.new", generation_path(folder, number)
    for left in (path, goal):
        shutil.rmtree(left, ignore_errors=True)
    path.mkdir()
    try:
        arrays, tables = _tables(path, source)
        data = source.dense.encoded()
        allocate_dense(path, data)
        model = built(bundle, plugins, tables, source.dense.state)
        apply.write_rows(model, rows, pause=False)
        side = ItemSide.make(model, bundle.encoder, bundle.catalogue, most_bytes)
        items, held = (None, None) if side is None else _items(path, side.held)
        layout = Layout(arrays, items)
        (path / LAYOUT).write_bytes(msgspec.json.encode(layout))
        generation = Generation(goal, layout, tables, held)
        view = view_of(bundle, model, generation, source.dense, version, most_bytes)
        check(view, version)
        path.rename(goal)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return Made(generation, view, data)


def _tables(path: Path, source: Source) -> tuple[dict[str, Array], dict[str, Tensor]]:
    """The tables' file of a generation at `path`: what lies where, and what is there, mapped."""
    if isinstance(source.tables, Generation):
        link(source.tables.path / TABLES, path / TABLES)
        arrays = source.tables.layout.tables
        return arrays, mapped(path / TABLES, arrays, writable=True)
    shapes = {name: (len(table), table.shape[1]) for name, table in source.tables.items()}
    if source.kind == "int8":
        arrays = placed({name: (rows, row_bytes(dim)) for name, (rows, dim) in shapes.items()}, "uint8")
    else:
        arrays = placed(shapes)
    tables = allocate_arrays(path / TABLES, arrays)
    for name, table in source.tables.items():
        copy_table(table, tables[name])
    return arrays, tables


def _items(path: Path, held: HeldItems) -> tuple[ItemsLayout, HeldItems]:
    """The same numbers in the items' file of a generation at `path`."""
    arrays = placed({name: (len(a), a.shape[1]) for name, a in (("vectors", held.vectors), ("dense", held.dense))})
    vectors, dense = allocate_arrays(path / ITEMS, arrays).values()
    copy(held.vectors, vectors)
    copy(held.dense, dense)
    layout = ItemsLayout(arrays["vectors"], arrays["dense"], dict(held.widths), dict(held.shared))
    return layout, replace(held, vectors=vectors, dense=dense)
