"""What commands print: results on stdout, progress on stderr; with `--json` one JSON value, last on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, Self

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON value, last on stdout.")]


def is_first_process() -> bool:
    """Under torchrun only the first process prints."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """One line of JSON; numbers that JSON lacks (NaN, infinity) become null."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Numpy numbers, arrays, paths and non-finite floats as JSON has them."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, styles: Mapping[str, str] | None = None
) -> None:
    """A table on stdout. styles: text of a cell -> its style."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in map(_cell, row)))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def print_figures(figures: Mapping[str, Any]) -> None:
    """Names and numbers, one a line; what is nested is left to `--json`."""
    plain_figures = {k: _cell(v) for k, v in figures.items() if not isinstance(v, Mapping | list | tuple)}
    width = max(map(len, plain_figures), default=0)
    for name, text in plain_figures.items():
        print(f"{name:<{width}}  {text}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


SILENCE = 30.0
"""Seconds without a line after which a long stage says how far it is, where stderr is no terminal."""


class Progress:
    """Stages and how far each is, on stderr: bars on a terminal, elsewhere a line where a stage begins, where it ends
    with its seconds, and every `SILENCE` seconds between.

    Called as `progress(stage, fraction)`, fraction in [0, 1]; what follows a semicolon in `stage` is detail that
    changes, such as the epoch and the loss.
    """

    def __init__(self) -> None:
        self._stage = self._latest = ""
        self._began = self._told = 0.0
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._quiet = not is_first_process()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif error is None:
            self._end()

    def __call__(self, stage: str, fraction: float) -> None:
        name = stage.split(";")[0]
        if self._quiet:
            return
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(stage, total=1.0)
            self._bars.update(self._tasks[name], completed=fraction, description=stage)
            return
        now = time.monotonic()
        if name != self._stage:
            self._end()
            if fraction >= 1.0:  # over as soon as it is told
                self._line(stage)
                return
            self._stage, self._began, self._told = name, now, now
            self._line(f"{name} ...")
        elif now - self._told >= SILENCE:
            self._told = now
            self._line(f"{stage}: {fraction:.0%}")
        self._latest = stage

    def _end(self) -> None:
        if self._stage:
            self._line(f"{self._latest}: {time.monotonic() - self._began:.1f} s")
            self._stage = ""

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
