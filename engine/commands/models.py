"""`plexrank models list|promote|rollback|diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.bundles import print_differences
from engine.commands.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from engine.streaming.pointer import Pointer
    from engine.streaming.registry import ModelRegistry

app = typer.Typer(no_args_is_help=True, help="Versions of a model: list, promote, roll back, compare.")

RootOption = Annotated[Path, typer.Option("--models", metavar="ROOT", help="Folder of the registry.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Where the registry holds several: which.")]
PinOption = Annotated[bool, typer.Option("--pin", help="Serve exactly this until the next promotion: no deltas.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Kept with the pointer.")]


@app.command("list")
def list_(models: RootOption, model: ModelOption = None, json: JsonFlag = False) -> None:
    """Print the versions, oldest first, and which one is served."""
    registry = _registry(models, model)
    found, pointer = registry.versions(), registry.current()
    if json:
        current = None if pointer is None else pointer.as_dict()
        print_json({"model": registry.model, "current": current, "versions": [v.as_dict() for v in found]})
        return
    rows = []
    for v in found:
        marks = [name for name, holds in (("current", v.current), ("pinned", v.pinned)) if holds]
        marks += [] if v.problem is None else [v.problem]
        rows.append((v.version, v.created, v.parent, v.auc, v.logloss, ", ".join(marks)))
    print(f"{registry.model}: {len(found)} versions")
    print_table(["version", "created", "parent", "auc", "logloss", ""], rows)
    if pointer is not None:
        print(f"{pointer.version} is served since epoch {pointer.epoch}: {pointer.reason or 'no reason given'}")


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Of the list, or the folder of a bundle.")],
    models: RootOption,
    model: ModelOption = None,
    pin: PinOption = False,
    reason: ReasonOption = None,
    json: JsonFlag = False,
) -> None:
    """Serve a version from now on, or take a bundle in and serve it; servers follow within a second."""
    registry = _registry(models, model)
    path = Path(version)
    if (path / "manifest.json").is_file():
        version = registry.take_in(path)
    _say(registry.promote(version, reason=reason or "promoted by hand", pin=pin), json)


@app.command()
def rollback(
    models: RootOption,
    to: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="Default: the one served before.")] = None,
    model: ModelOption = None,
    pin: PinOption = False,
    reason: ReasonOption = None,
    json: JsonFlag = False,
) -> None:
    """Go back to the version that was served before; deltas of the chain that is left are not applied any more."""
    _say(_registry(models, model).rollback(to, reason=reason or "rolled back by hand", pin=pin), json)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A version, or `current`.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="A version, or `current`.")],
    models: RootOption,
    model: ModelOption = None,
    json: JsonFlag = False,
) -> None:
    """Print what differs between two versions: configuration, plugins, metrics, tensors."""
    found: dict[str, Any] = _registry(models, model).diff(old, new)
    if json:
        print_json(found)
    else:
        print_differences(found)


def _registry(root: Path, model: str | None) -> ModelRegistry:
    from engine.streaming.registry import ModelRegistry

    return ModelRegistry(root, model)


def _say(pointer: Pointer, json: bool) -> None:
    if json:
        print_json(pointer.as_dict())
    else:
        pinned = ", pinned" if pointer.pinned else ""
        print(f"{pointer.model} {pointer.version} is served from epoch {pointer.epoch} on{pinned}")
