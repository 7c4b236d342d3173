"""What the commands about events share: which log is meant, and how it is opened beside a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engine.components import EventLog

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Configuration whose serving.event_log is the log.", exists=True)
]
StateDir = Annotated[Path, typer.Option(help="The server's, where the log is in a folder of it.")]


@contextmanager
def opened(config: Path, state_dir: Path, stream: str = "events", *, writes: bool = False) -> Iterator[EventLog]:
    """The configuration's log, or the stream of that name beside it, to read beside whoever writes it."""
    from engine.loading import load_config
    from engine.plugins import installed
    from engine.streaming.events.open_log import open_log

    use = load_config(config).serving.event_log
    log = open_log(installed(), use, state_dir, read_only=not writes)
    try:
        if stream == "events":
            yield log
        else:
            beside = log.sibling(stream)
            try:
                yield beside
            finally:
                beside.close()
    finally:
        log.close()
