"""`plexrank bundle show|verify|diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.output import JsonFlag, print_figures, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Look into a trained model: show, verify, diff.")

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder `bundle` of a run.")]


@app.command()
def show(bundle: BundleArgument, json: JsonFlag = False) -> None:
    """Print what is in a bundle: features, plugins, metrics, tensors, files."""
    from engine.bundle import show as describe

    found = describe(bundle)
    if json:
        print_json(found)
        return
    print_figures({k: v for k, v in found.items() if not isinstance(v, dict | list)})
    print_figures(_flat({"metrics": found["metrics"], "calibration": found["calibration"]}))
    for part in ("features", "plugins", "tensors"):
        columns = list(found[part][0]) if found[part] else []
        print_table(columns, [list(row.values()) for row in found[part]])
    print_table(["file", "bytes"], found["files"].items())


@app.command()
def verify(bundle: BundleArgument, json: JsonFlag = False) -> None:
    """Check every file against its digest and every tensor for name, shape and finite numbers; exit 1 if not fit."""
    from engine.bundle import verify as check
    from engine.plugins import installed

    result = check(bundle, installed())
    if json:
        print_json(result.as_dict())
    else:
        findings = [("problem", text) for text in result.problems] + [("warning", text) for text in result.warnings]
        if findings:
            print_table(["", "what"], findings, styles={"problem": "red", "warning": "yellow"})
        state = "is whole" if result.ok else "is not fit to serve"
        known = f"{result.name} {result.version} {state}; {result.files} files, {result.bytes:,} bytes"
        print(f"{bundle}: {known if result.version else state}")
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD")],
    new: Annotated[Path, typer.Argument(metavar="NEW")],
    json: JsonFlag = False,
) -> None:
    """Print what differs between two bundles: configuration, plugins, metrics, tensors."""
    from engine.bundle import diff as differences

    found = differences(old, new)
    if json:
        print_json(found)
    else:
        print_differences(found)


def print_differences(found: dict[str, Any]) -> None:
    """What `engine.bundle.diff` found, as a table."""
    names = [f"{found[side]['name']} {found[side]['version']}" for side in ("a", "b")]
    print(f"{names[0]} and {names[1]} {'are the same' if found['same'] else 'differ'}")
    rows = [
        (part, key, value)
        for part, keys in found.items()
        if part not in ("a", "b", "same")
        for key, value in _pairs(keys)
    ]
    if rows:
        print_table(["part", "what", "old and new"], rows)


def _pairs(tree: Any) -> list[tuple[str, str]]:
    """Leaves of a tree of differences; a list is a pair of an old and a new value."""
    flat = _flat(tree) if isinstance(tree, dict) else {"": tree}
    return [
        (key, " | ".join(map(str, value)) if isinstance(value, list) else str(value)) for key, value in flat.items()
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat
