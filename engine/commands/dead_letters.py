"""`plexrank events dead list|show|resubmit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.event_log import ConfigArgument, StateDir, opened
from engine.commands.output import JsonFlag, print_figures, print_json, print_table

if TYPE_CHECKING:
    from engine.streaming.events.dead import DeadLetters, Letter

app = typer.Typer(no_args_is_help=True, help="Events that were refused: list, show, resubmit.")

Reason = Annotated[str | None, typer.Option(help="Only those of this reason: json, schema, future, ...")]


@contextmanager
def _opened(config: Path, state_dir: Path, *, writes: bool = False) -> Iterator[DeadLetters]:
    from engine.streaming.events.dead import DeadLetters

    with opened(config, state_dir, writes=writes) as log:
        letters = DeadLetters(log)
        try:
            yield letters
        finally:
            letters.close()


@app.command("list")
def list_(
    config: ConfigArgument,
    state_dir: StateDir = Path("state"),
    reason: Reason = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 100,
    json: JsonFlag = False,
) -> None:
    """List refused events: why, where they stood, and whether they were sent again."""
    from engine.streaming.events.readable import short

    with _opened(config, state_dir) as letters:
        found = letters.list(limit, reason)
    if json:
        print_json([_as_dict(letter) for letter in found])
        return
    rows = [
        (
            "{}:{}".format(*letter.place),
            letter.reason,
            short(letter.detail),
            f"{letter.partition}:{letter.offset}" + (f" row {letter.row}" if letter.row >= 0 else ""),
            datetime.fromtimestamp(letter.first_seen, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "yes" if letter.resubmitted else "",
        )
        for letter in found
    ]
    print_table(["letter", "reason", "detail", "stood at", "seen", "sent again"], rows)


@app.command()
def show(
    config: ConfigArgument,
    letter: Annotated[str, typer.Argument(metavar="LETTER", help="Its place, as `list` says it: 0:12.")],
    state_dir: StateDir = Path("state"),
    json: JsonFlag = False,
) -> None:
    """Print one refused event with its original bytes."""
    from engine.errors import EventError
    from engine.streaming.events.positions import place

    wanted = place(letter)
    with _opened(config, state_dir) as letters:
        found = next((one for one in letters.list(1_000_000_000) if one.place == wanted), None)
    if found is None:
        raise EventError(f"no letter stands at {letter} (`plexrank events dead list`)")
    if json:
        print_json(_as_dict(found))
        return
    figures = _as_dict(found)
    value = figures.pop("value")
    print_figures(figures)
    if value is None:
        value = "too long to be copied; it is in the log at its position"
    print("\n" + "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value))


@app.command()
def resubmit(
    config: ConfigArgument,
    places: Annotated[list[str] | None, typer.Argument(metavar="LETTER...", help="As `list` says them: 0:12.")] = None,
    state_dir: StateDir = Path("state"),
    reason: Reason = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write refused events to the log again, as they were; none twice. Exit 1 where some could not be found.

    A log in a folder has one writer: stop the server first. A broker takes them beside it.
    """
    from engine.streaming.events.positions import place

    if sum(map(bool, (places, reason, everything))) != 1:
        raise typer.BadParameter("name letters, or say --reason or --all")
    which: Any = list(map(place, places)) if places else reason
    with _opened(config, state_dir, writes=True) as letters:
        counts = letters.resubmit(which=which)
    if json:
        print_json(counts)
    else:
        print_figures(counts)
    raise typer.Exit(1 if counts["gone"] or counts["unknown"] else 0)


def _as_dict(letter: Letter) -> dict[str, Any]:
    """With the original bytes as text; what is no UTF-8 in it is escaped."""
    value = None if letter.value is None else letter.value.decode(errors="backslashreplace")
    return {
        "letter": "{}:{}".format(*letter.place),
        "reason": letter.reason,
        "detail": letter.detail,
        "stream": letter.stream,
        "partition": letter.partition,
        "offset": letter.offset,
        "row": letter.row if letter.row >= 0 else None,
        "key": letter.key,
        "size": letter.size,
        "sha256": letter.sha256,
        "first_seen": letter.first_seen,
        "resubmitted": letter.resubmitted,
        "value": value,
    }
