"""`plexrank validate`, `plexrank doctor`, `plexrank plugins` and `plexrank version`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from engine.commands.output import JsonFlag, print_json, print_table
from engine.commands.training import ConfigArgument, SetOption, overrides_of

STYLES = {"PASS": "green", "ok": "green", "WARN": "yellow", "info": "dim", "FAIL": "red", "wrong": "bold red"}


def validate(
    config: ConfigArgument,
    data: Annotated[bool, typer.Option("--data", help="Also read the data and check it.")] = False,
    set_: SetOption = None,
    json: JsonFlag = False,
) -> None:
    """Check a configuration and, with --data, the data behind it."""
    from engine.loading import load_config, located
    from engine.plugins import installed

    loaded = load_config(config, overrides_of(set_, None))
    checks = [
        ("configuration", "PASS", f"{config}: {len(loaded.features)} features, tasks {', '.join(loaded.data.labels)}")
    ]
    if data:
        from engine.data.validate import check_data

        with located(config):
            checks += [(c.name, str(c.status), c.detail) for c in check_data(loaded, installed())]
    failed = any(status == "FAIL" for _, status, _ in checks)
    if json:
        rows = [{"name": n, "status": s, "detail": d} for n, s, d in checks]
        print_json({"config": str(config), "ok": not failed, "checks": rows})
    else:
        print_table(["check", "result", "detail"], checks, styles=STYLES)
    raise typer.Exit(1 if failed else 0)


def plugins(
    kind: Annotated[str | None, typer.Option(help="Only this kind, such as interests.")] = None,
    json: JsonFlag = False,
) -> None:
    """List the installed plugins: kind, name, where each comes from, options, and one line."""
    from dataclasses import asdict

    from engine.plugins import installed

    known = installed()
    if kind is not None and kind not in known.kinds():
        raise typer.BadParameter(f"no kind '{kind}'; kinds are {', '.join(known.kinds())}", param_hint="--kind")
    rows = [row for row in known.table() if kind in (None, row.kind)]
    if json:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        ["kind", "name", "version", "distribution", "options", "what it is"],
        [(r.kind, r.name, r.version, r.distribution, ", ".join(r.options) or "-", r.summary) for r in rows],
    )


def doctor(json: JsonFlag = False) -> None:
    """Check this machine: versions that fit each other, cores, memory, disk, services; exit 1 if it cannot work."""
    from engine.doctor import examine

    findings = examine()
    broken = any(f.status == "wrong" for f in findings)
    if json:
        rows = [{"name": f.name, "status": f.status, "detail": f.detail, "remedy": f.remedy} for f in findings]
        print_json({"ok": not broken, "findings": rows})
    else:
        rows_ = [(f.name, f.status, f.detail + (f"\nto mend it: {f.remedy}" if f.remedy else "")) for f in findings]
        print_table(["what", "state", "detail"], rows_, styles=STYLES)
    raise typer.Exit(1 if broken else 0)


def version(json: JsonFlag = False) -> None:
    """Print the version of plexrank."""
    from engine import __version__

    print_json({"plexrank": __version__}) if json else print(f"plexrank {__version__}")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
    json: JsonFlag = False,
) -> None:
    """Start a project: a configuration, an example plugin with its test, a README."""
    from engine.scaffold import create_project

    files = create_project(folder)
    if json:
        print_json({"folder": str(folder), "files": files})
        return
    print(f"{folder}: {len(files)} files\nnext: cd {shlex.quote(str(folder))} && pip install --no-deps -e . && pytest")
