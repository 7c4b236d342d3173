"""`plexrank train` and `plexrank compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.output import JsonFlag, Progress, is_first_process, print_figures, print_json, print_table

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/synthetic.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value of the file; may be repeated."),
]


def train(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    seed: Annotated[int | None, typer.Option(help="In place of the file's seed.")] = None,
    set_: SetOption = None,
    json: JsonFlag = False,
) -> None:
    """Train a model and write a bundle.

    The folder gets bundle/, report.html and checkpoints/. Under torchrun the same command trains in many processes:
    torchrun --nproc-per-node 2 -m engine train CONFIG --out DIR
    """
    from engine.loading import load_config, located
    from engine.plugins import installed
    from engine.train_command import run_training

    loaded = load_config(config, overrides_of(set_, seed))
    with located(config), Progress() as progress:
        figures = run_training(
            loaded, out or Path("runs") / loaded.name, resume=resume, progress=progress, plugins=installed()
        )
    if is_first_process():
        print_json(figures) if json else print_figures(figures)


def compare(
    config: ConfigArgument,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B", help="A key and the values to try; several keys are crossed."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each; the table shows mean and deviation.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the plot.")] = Path("runs/compare"),
    set_: SetOption = None,
    json: JsonFlag = False,
) -> None:
    """Train variants of one configuration and put them side by side.

    For example: plexrank compare configs/movielens-100k.yaml --vary interest.name=mean,din --seeds 3
    """
    variants = varied(vary)
    from engine.compare import compare as run
    from engine.compare import table
    from engine.loading import load_config, located

    loaded = load_config(config, overrides_of(set_, None))
    with located(config), Progress() as progress:
        rows = run(loaded, variants, seeds, out, progress=progress)
    if json:
        print_json({"config": str(config), "seeds": seeds, "rows": rows, "out": str(out)})
        return
    print_table(*table(rows))


def overrides_of(assignments: list[str] | None, seed: int | None) -> dict[str, Any]:
    """`["training.epochs=2"]` -> `{"training.epochs": "2"}`; a value without `=` is a usage error."""
    found: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"'{assignment}' is not KEY=VALUE", param_hint="--set")
        found[key.strip()] = value
    if seed is not None:
        found["seed"] = seed
    return found


def varied(options: list[str] | None) -> dict[str, list[str]]:
    """`["interest.name=mean,din"]` -> `{"interest.name": ["mean", "din"]}`."""
    found: dict[str, list[str]] = {}
    for option in options or []:
        key, equals, values = option.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise typer.BadParameter(f"'{option}' is not KEY=A,B", param_hint="--vary")
        found[key.strip()] = [value.strip() for value in values.split(",")]
    return found
