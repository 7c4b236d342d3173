"""`plexrank events tail|replay|import|validate|topics|dead`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import dead_letters, event_files
from engine.commands.event_log import ConfigArgument, StateDir, opened
from engine.commands.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from engine.components import EventLog, LogRecord

app = typer.Typer(no_args_is_help=True, help="Look into the event log: tail, replay, import, validate, topics, dead.")
app.command("import")(event_files.import_)
app.command("validate")(event_files.validate)
app.add_typer(dead_letters.app, name="dead")

Stream = Annotated[str, typer.Option(help="events, or one beside it: dead, examples, deltas, models.")]
Offsets = Annotated[list[str] | None, typer.Option("--offset", help="partition:offset, as in 0:1200; repeatable.")]

_CHUNK = 1000
_PATIENCE = 5.0


@app.command()
def tail(
    config: ConfigArgument,
    state_dir: StateDir = Path("state"),
    stream: Stream = "events",
    count: Annotated[int, typer.Option("--count", "-n", min=0, max=100_000, help="Records shown at first.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")] = False,
    json: JsonFlag = False,
) -> None:
    """Print the newest records, a line each; with --json one JSON object a line."""
    from engine.streaming.events.positions import last

    with opened(config, state_dir, stream) as log:
        positions, ends = last(log, count), log.ends()
        found = sorted(_between(log, positions, ends), key=lambda r: (r.seconds or 0.0, r.partition, r.offset))
        show = _Printer(json)
        show(found[len(found) - min(count, len(found)) :])
        if not follow:
            return
        reader = log.reader(ends)
        try:
            while True:
                show(reader.poll(_CHUNK, timeout=0.5))
        except KeyboardInterrupt:
            pass
        finally:
            reader.close()


@app.command()
def replay(
    config: ConfigArgument,
    state_dir: StateDir = Path("state"),
    stream: Stream = "events",
    offset: Offsets = None,
    since: Annotated[str | None, typer.Option("--time", help="From then on, as in 2026-01-31T12:00:00Z.")] = None,
    earliest: Annotated[bool, typer.Option("--earliest", help="From the beginning.")] = False,
    into: Annotated[str | None, typer.Option(help="Stream beside the log to append to; default: stdout.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Records at most.")] = None,
) -> None:
    """Give records again from a position on, up to the end of now: as NDJSON on stdout, or into another stream.

    Into a stream they go as they are, key, bytes and headers. On stdout, what is no JSON is left out and counted.
    """
    from engine.streaming.events.positions import from_places, from_time, moment

    if sum(map(bool, (offset, since, earliest))) != 1:
        raise typer.BadParameter("say one of --offset, --time and --earliest")
    with opened(config, state_dir, stream) as log:
        if offset:
            positions = from_places(log, offset)
        else:
            positions = log.begins() if since is None else from_time(log, moment(since))
        records = _between(log, positions, log.ends(), limit)
        if into is None:
            _to_stdout(records)
        elif into == stream:
            raise typer.BadParameter("a stream is not replayed into itself")
        else:
            _into(log if stream == "events" else None, records, config, state_dir, into)


def _between(
    log: EventLog, positions: dict[int, int], ends: dict[int, int], limit: int | None = None
) -> Iterator[LogRecord]:
    """Records from `positions` up to `ends`; LogUnavailable where they do not come."""
    from engine.errors import LogUnavailable

    if all(start >= ends[partition] for partition, start in positions.items()):
        return
    reader, given, waited = log.reader(positions), 0, time.monotonic()
    try:
        while any(at < ends[partition] for partition, at in reader.positions.items()):
            records = reader.poll(_CHUNK, timeout=0.2)
            if records:
                waited = time.monotonic()
            elif time.monotonic() - waited > _PATIENCE:
                raise LogUnavailable(f"nothing came for {_PATIENCE:.0f} seconds, and the ends are {ends}; try again")
            for record in records:
                if record.offset < ends[record.partition]:
                    if limit is not None and given >= limit:
                        return
                    given += 1
                    yield record
    finally:
        reader.close()


def _to_stdout(records: Iterator[LogRecord]) -> None:
    """One event a line, in structured mode."""
    import msgspec

    from engine.streaming.events.readable import document

    left_out = 0
    for record in records:
        event = document(record)
        if event is None:
            left_out += 1
        else:
            sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()
    if left_out:
        print(f"{left_out:,} records that are no JSON were left out", file=sys.stderr)


def _into(log: EventLog | None, records: Iterator[LogRecord], config: Path, state_dir: Path, into: str) -> None:
    from itertools import islice

    with opened(config, state_dir, into) as target:
        written = 0
        while batch := list(islice(records, _CHUNK)):
            target.append([(r.key, r.value) for r in batch], [r.headers for r in batch])
            written += len(batch)
            print(f"\r{written:,} records", end="", file=sys.stderr)
        print(f"\r{written:,} records into {into}", file=sys.stderr)


@app.command()
def topics(
    config: ConfigArgument,
    state_dir: StateDir = Path("state"),
    partitions: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of the log, where it is made; dead and examples take as many.")
    ] = None,
    learner: Annotated[
        Path | None, typer.Option(exists=True, help="A learner's --out: how far its checkpoint is behind.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make the log and the streams beside it where they are missing, and list them by partition.

    Only `models` is compact: of the pointer to the served bundle the newest is enough, of deltas all are needed.
    The learner's lag is that of --learner; without it, that of group plexrank.NAME, in which learners keep a copy of
    their positions where the log has groups.
    """
    from engine.loading import load_config
    from engine.plugins import installed
    from engine.streaming.learning.topics import describe

    loaded = load_config(config)
    use = loaded.serving.event_log
    rows = describe(installed(), use, state_dir, partitions, model=loaded.name, learner=learner)
    if json:
        print_json([row.as_dict() for row in rows])
        return
    columns = ["stream", "partition", "begin", "end", "records", "newest, s ago", "learner's lag"]
    print_table(columns, [(r.stream, r.partition, r.begin, r.end, r.end - r.begin, r.age, r.lag) for r in rows])


class _Printer:
    """Prints records as they come: columns of fixed width, or JSON."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def __call__(self, records: list[LogRecord]) -> None:
        from engine.streaming.events.readable import as_json, line

        for record in records:
            if self.as_json:
                print_json(as_json(record))
            else:
                when, place, kind, user, what, id_ = line(record)
                print(f"{when:<19}  {place:>9}  {kind:<11}  {user:<12}  {what}  {id_}".rstrip())
        sys.stdout.flush()
