"""`plexrank models list|promote|rollback|pin|unpin|diff`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.bundles import print_differences
from engine.commands.event_log import StateDir
from engine.commands.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from engine.streaming.deltas.pointer import Pointer
    from engine.streaming.deltas.registry import ModelRegistry

app = typer.Typer(no_args_is_help=True, help="Versions of a model: list, promote, roll back, pin, compare.")

RootOption = Annotated[Path, typer.Option("--models", metavar="ROOT", help="Folder of the registry.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Where the registry holds several: which.")]
PinOption = Annotated[
    bool, typer.Option("--pin", help="Serve exactly this until `unpin` or the next promotion: no deltas.")
]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Kept with the pointer.")]

ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="CONFIG", exists=True, help="Names the event log, which is told too: for servers elsewhere."),
]


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
    config: ConfigOption = None,
    state_dir: StateDir = Path("state"),
    json: JsonFlag = False,
) -> None:
    """Serve a version from now on, or take a bundle in and serve it; servers follow within a second."""
    registry = _registry(models, model)
    path = Path(version)
    if (path / "manifest.json").is_file():
        version = registry.take_in(path)
    _say(registry.promote(version, reason=reason or "promoted by hand", pin=pin), json, config, state_dir)


@app.command()
def rollback(
    models: RootOption,
    to: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="Default: the one served before.")] = None,
    model: ModelOption = None,
    pin: PinOption = False,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    state_dir: StateDir = Path("state"),
    json: JsonFlag = False,
) -> None:
    """Go back to the version that was served before; deltas of the chain that is left are not applied any more."""
    pointer = _registry(models, model).rollback(to, reason=reason or "rolled back by hand", pin=pin)
    _say(pointer, json, config, state_dir)


@app.command()
def pin(
    models: RootOption,
    model: ModelOption = None,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    state_dir: StateDir = Path("state"),
    json: JsonFlag = False,
) -> None:
    """Serve exactly the current bundle, without what was learned since; learners go on from it and publish nothing."""
    _say(_registry(models, model).pin(reason=reason or "pinned by hand"), json, config, state_dir)


@app.command()
def unpin(
    models: RootOption,
    model: ModelOption = None,
    reason: ReasonOption = None,
    config: ConfigOption = None,
    state_dir: StateDir = Path("state"),
    json: JsonFlag = False,
) -> None:
    """Let learners publish again: what they learned since the pin is served at once."""
    _say(_registry(models, model).unpin(reason=reason or "unpinned by hand"), json, config, state_dir)


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
    from engine.streaming.deltas.registry import ModelRegistry

    return ModelRegistry(root, model)


def _say(pointer: Pointer, json: bool, config: Path | None, state_dir: Path) -> None:
    if config is not None:
        _tell(pointer, config, state_dir)
    if json:
        print_json(pointer.as_dict())
    else:
        pinned = ", pinned" if pointer.pinned else ""
        print(f"{pointer.model} {pointer.version} is served from epoch {pointer.epoch} on{pinned}")


def _tell(pointer: Pointer, config: Path, state_dir: Path) -> None:
    """Of the log, too; the pointer holds where that fails."""
    from engine.commands.event_log import opened
    from engine.errors import EventError
    from engine.streaming.deltas.announce import tell

    try:
        with opened(config, state_dir) as log:
            tell(log, pointer)
    except EventError as error:
        print(f"the registry says so, but the log was not told: {error}", file=sys.stderr)
