"""`plexrank`: exit 0 where all went well, 1 where it did not (one line on stderr says why), 2 for wrong usage."""

from __future__ import annotations

import ast
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from engine.commands import bundles, checking, events, learning, models, training
from engine.errors import PlexrankError, PluginError

COMMANDS_GROUP = "plexrank.commands"
"""Entry points of other packages: name of the command -> a function, or a Typer application for a group."""

BUILT_IN: dict[str, Callable[..., None]] = {
    "train": training.train,
    "compare": training.compare,
    "learn": learning.learn,
    "validate": checking.validate,
    "plugins": checking.plugins,
    "doctor": checking.doctor,
    "init": checking.init,
    "version": checking.version,
}
GROUPS: dict[str, typer.Typer] = {"bundle": bundles.app, "events": events.app, "models": models.app}


def main() -> None:
    """The command line's entry."""
    quiet_third_parties()
    try:
        build(sys.argv[1:])()
    except PlexrankError as error:
        _stop(str(error))
    except OSError as error:
        _stop(f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:
        _stop(f"unexpected {type(error).__name__}: {error} (PLEXRANK_DEBUG=1 shows where)")


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application for these arguments: another package's command is imported only where it is meant."""
    app = typer.Typer(
        name="plexrank",
        help="Retrieve, rank, learn and experiment; every modelling choice is a plugin.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name, function in BUILT_IN.items():
        app.command(name)(function)
    for name, group in GROUPS.items():
        app.add_typer(group, name=name)
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    if wanted not in (*BUILT_IN, *GROUPS):
        for point in sorted(entry_points(group=COMMANDS_GROUP), key=lambda p: p.name):
            if wanted == point.name:
                _attach(app, point)
            elif wanted is None:
                _list(app, point)
    return app


def quiet_third_parties() -> None:
    """Silences warnings that a user can do nothing about; what plexrank itself warns of is logged."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("torchrec", "fbgemm_gpu"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # torch sets its loggers' levels anew when it is imported; filters stay.
    logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|torchrec|fbgemm")


def _attach(app: typer.Typer, point: EntryPoint) -> None:
    """The command itself, imported."""
    try:
        command: Any = point.load()
    except Exception as error:
        distribution = point.dist.name if point.dist else "unknown"
        raise PluginError(
            f"{distribution}: command '{point.name}' ({point.value}) cannot be imported: {error}"
        ) from error
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=point.name)
    else:
        app.command(point.name)(command)


def _list(app: typer.Typer, point: EntryPoint) -> None:
    """A line of the help, read from the source: what a command imports may take seconds."""

    def command() -> None:
        return None

    command.__doc__ = _summary(point)
    app.command(point.name)(command)


def _summary(point: EntryPoint) -> str:
    """The docstring of the function that an entry point names, or of its module."""
    try:
        spec = find_spec(point.module)
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))  # type: ignore[union-attr, arg-type]
    except (ImportError, AttributeError, TypeError, ValueError, OSError, SyntaxError) as error:
        return f"Broken: {point.value} cannot be read: {type(error).__name__}."
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == point.attr]
    return ast.get_docstring(functions[0] if functions else tree) or ""


def _stop(message: str) -> None:
    if os.environ.get("PLEXRANK_DEBUG"):
        raise
    print(message, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
