"""`plexrank bundle show|verify|diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.commands.output import JsonFlag, print_figures, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Look into a trained model: show, verify, diff.")

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `plexrank train` wrote.")]


@app.command()
def show(bundle: BundleArgument, json: JsonFlag = False) -> None:
    """Print a bundle's manifest: name, version, plugins, metrics, files."""
    from engine.bundle import Bundle

    manifest = Bundle.open(bundle, verify=False).manifest
    print_json(manifest) if json else print_figures(_flat(manifest))


@app.command()
def verify(bundle: BundleArgument, json: JsonFlag = False) -> None:
    """Check every file against its digest, every tensor for shape and finite numbers; exit 1 if one is wrong."""
    from engine.bundle import Bundle
    from engine.bundle import verify as check

    check(bundle)
    version = Bundle.open(bundle, verify=False).version
    print_json({"bundle": str(bundle), "version": version, "ok": True}) if json else print(
        f"{bundle}: {version} is whole"
    )


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD")],
    new: Annotated[Path, typer.Argument(metavar="NEW")],
    json: JsonFlag = False,
) -> None:
    """Print what differs between two bundles: configuration, metrics, tensors."""
    from engine.bundle import diff as differences

    found = differences(old, new)
    print_json(found) if json else print_table(["what", "difference"], _flat(found).items())


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted names."""
    if not isinstance(tree, dict):
        return {prefix: ", ".join(map(str, tree)) if isinstance(tree, list | tuple) else tree}
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat
