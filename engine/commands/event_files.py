"""`plexrank events import` and `plexrank events validate`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands.event_log import ConfigArgument, StateDir, opened
from engine.commands.output import JsonFlag, print_json, print_table
from engine.errors import EventError

if TYPE_CHECKING:
    from engine.components import EventLog
    from engine.events import Event, EventLimits
    from engine.streaming.events.import_events import Tally

_CHUNK, _BODY_BYTES = 1000, 900_000

BATCH_KEY = "batch"


class Form(StrEnum):
    """How events stand in records."""

    STRUCTURED = "structured"
    BINARY = "binary"
    ARROW = "arrow"


FilesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="A CloudEvent a line (.ndjson, .jsonl, .json), or an interaction a row (.parquet, .csv, .tsv, .arrow).",
        exists=True,
        dir_okay=False,
    ),
]


def import_(
    config: ConfigArgument,
    files: FilesArgument,
    state_dir: StateDir = Path("state"),
    server: Annotated[
        str | None, typer.Option(help="Send them to this server, as in http://127.0.0.1:8080, which writes its log.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Of a table's events; default: the file's name.")] = None,
    type_: Annotated[str, typer.Option("--type", help="Of a table's interactions, without a column type.")] = "click",
    form: Annotated[
        Form,
        typer.Option(
            help="Of the records: structured (JSON), binary (attributes as headers), arrow (many events a record; "
            "needs a log of one partition)."
        ),
    ] = Form.STRUCTURED,
    json: JsonFlag = False,
) -> None:
    """Append the events of files to the log; name each line that is refused, and exit 1 if there is one.

    A log in a folder has one writer: while a server runs, say --server. A table has the columns user, item, time and,
    where it knows them, type, ranking, value. Importing twice gives the same ids, so that each event counts once.
    """
    from engine.commands.output import Progress
    from engine.streaming.events.import_events import Tally, read_events

    tally, counts, read, total = Tally(), Counter[str](), 0, max(1, sum(file.stat().st_size for file in files))
    if server is not None and form is not Form.STRUCTURED:
        raise typer.BadParameter("a server takes structured events only", param_hint="--form")
    with _sink(config, state_dir, server, form) as (limits, send), Progress() as progress:
        for file in files:
            events = read_events(file, limits, tally, source=source, type_=type_)
            for batch in _batches(events):
                counts.update(send(batch))
                done = sum(len(event.value) for event in batch)
                read += done
                progress(f"import; {file.name}, {tally.good:,} events", min(0.99, read / total))
        progress("import", 1.0)
    counts["refused"] += tally.refused
    _say_faults(tally)
    if json:
        print_json({**counts, "faults": tally.faults})
    else:
        print(", ".join(f"{count:,} {status}" for status, count in counts.items() if count) or "no events")
    raise typer.Exit(1 if counts["refused"] else 0)


@contextmanager
def _sink(
    config: Path, state_dir: Path, server: str | None, form: Form
) -> Iterator[tuple[EventLimits, Callable[[list[Event]], Counter[str]]]]:
    """The limits, and where events go: to the log, or to a server."""
    import os

    from engine.events import EventLimits
    from engine.loading import load_config
    from engine.streaming.events.post_events import EventPoster

    serving = load_config(config).serving
    limits = EventLimits(serving.limits.id_bytes, serving.limits.depth)
    if server is not None:
        poster = EventPoster(server, None if serving.token_env is None else os.environ.get(serving.token_env))
        yield limits, lambda events: poster.send([event.value for event in events])
        return
    with opened(config, state_dir, writes=True) as log:
        if form is Form.ARROW and len(log.ends()) != 1:
            raise EventError(
                "a batch stands in one partition, and the log has several, in which each user's events have their own: "
                "import in another form, or into a log of one partition"
            )

        def append(events: list[Event]) -> Counter[str]:
            _append(log, events, form)
            return Counter(accepted=len(events))

        yield limits, append


def _append(log: EventLog, events: list[Event], form: Form) -> None:
    from engine.streaming.events.arrow_events import columns_of, encode_batch
    from engine.streaming.events.binary_mode import to_binary

    if form is Form.BINARY:
        records = [to_binary(event) for event in events]
        log.append([(key, value) for key, value, _ in records], [headers for _, _, headers in records])
        return
    single = [(event.key, event.value) for event in events]
    if form is Form.ARROW:
        batches = [value for kind, its in columns_of(events).items() for value in encode_batch(kind, its)]
        single = [(BATCH_KEY, value) for value in batches]
        single += [(event.key, event.value) for event in events if event.kind in ("item", "user")]
    log.append(single)


def _batches(events: Iterator[Event]) -> Iterator[list[Event]]:
    """Of a size that a server takes as one body."""
    batch: list[Event] = []
    size = 0
    for event in events:
        if batch and (len(batch) >= _CHUNK or size + len(event.value) > _BODY_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += len(event.value) + 1
    if batch:
        yield batch


def validate(files: FilesArgument, json: JsonFlag = False) -> None:
    """Check files of events without writing them: what is refused, by line, and what a learner would miss; exit 1 if
    an event is refused."""
    from engine.commands.checking import STYLES
    from engine.events import EventLimits
    from engine.streaming.events.examine_events import examine
    from engine.streaming.events.import_events import Tally

    results = []
    for file in files:
        tally = Tally()
        checks = examine(file, EventLimits(), tally)
        results.append((file, checks, tally))
        _say_faults(tally)
    failed = any(check.status == "FAIL" for _, checks, _ in results for check in checks)
    if json:
        rows = [
            {
                "file": str(file),
                "events": tally.good,
                "refused": tally.refused,
                "faults": tally.faults,
                "checks": [{"name": c.name, "status": c.status, "detail": c.detail} for c in checks],
            }
            for file, checks, tally in results
        ]
        print_json({"ok": not failed, "files": rows})
    else:
        lines = [(file.name, c.name, c.status, c.detail) for file, checks, _ in results for c in checks]
        print_table(["file", "check", "result", "detail"], lines, styles=STYLES)
    raise typer.Exit(1 if failed else 0)


def _say_faults(tally: Tally) -> None:
    for fault in tally.faults:
        print(fault, file=sys.stderr)
    if tally.refused > len(tally.faults):
        print(f"and {tally.refused - len(tally.faults):,} more", file=sys.stderr)
