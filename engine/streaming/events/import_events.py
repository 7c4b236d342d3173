"""Files -> events: CloudEvents as NDJSON, or interactions as a table, read in pieces; each refusal names its row.

A table's row has no id of its own, so it gets the hash of its values: importing a file twice gives the same events, and
who reads them knows each by source and id.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import mmh3
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import DataError, EventError
from engine.events import Event, EventLimits, decode_event
from engine.hashing import canonical

COLUMNS = ("user", "item", "time", "type", "ranking", "value")
LINES = (".ndjson", ".jsonl", ".json")
REQUIRED = ("user", "item", "time")
MOST_FAULTS = 100
"""Refusals that are named; the others are counted."""
MOST_LINE = 1 << 20
"""Bytes of a line of NDJSON."""
_ROWS = 10_000
_MILLISECONDS = 1e11
"""As seconds since 1970 this is the year 5138: a larger number counts something else."""


@dataclass
class Tally:
    """What became of a file's rows. faults: `path:line: why` or `path: row n: why` of the first refusals."""

    good: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def refuse(self, where: str, why: object) -> None:
        self.refused += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(f"{where}: {why}")


def read_events(
    path: Path,
    limits: EventLimits,
    tally: Tally,
    *,
    source: str | None = None,
    type_: str = "click",
    now: float | None = None,
) -> Iterator[Event]:
    """The good events of a file, in order; `tally` counts while they are taken.

    By its name: .ndjson, .jsonl, .json (a CloudEvent a line); .parquet, .csv, .tsv, .arrow, .feather (an interaction a
    row: columns user, item, time in seconds or ISO 8601, and type, ranking, value where they are there).
    source: the events' source where they come from a table; default: the file's name. type_: where there is no column
    `type`, or nothing in it. DataError where the file cannot be read as what it is called.
    """
    now = time.time() if now is None else now
    suffix = path.suffix.lower()
    if suffix in LINES:
        yield from _lines(path, limits, tally, now)
    elif suffix in _TABLES:
        for row, values in _numbered(path, suffix, tally):
            try:
                event = decode_event(_document(values, source or path.name, type_), limits, now)
            except EventError as error:
                tally.refuse(f"{path}: row {row}", error)
            else:
                tally.good += 1
                yield event
    else:
        raise DataError(f"{path}: a file of events ends in one of {', '.join((*LINES, *_TABLES))}")


def _numbered(path: Path, suffix: str, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values by column) of a table's rows, from 1; those that the reader refuses have numbers, too."""
    row = 0
    try:
        for values in _TABLES[suffix](path):
            row += 1
            if isinstance(values, str):
                tally.refuse(f"{path}: row {row}", values)
            else:
                yield row, values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read after row {row}: {error}") from error


def _lines(path: Path, limits: EventLimits, tally: Tally, now: float) -> Iterator[Event]:
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MOST_LINE + 1):
                number += 1
                if len(line) > MOST_LINE and not line.endswith(b"\n"):
                    tally.refuse(f"{path}:{number}", f"the line is longer than {MOST_LINE:,} bytes")
                    while (rest := file.readline(MOST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    continue
                if not line.strip():
                    continue
                try:
                    event = decode_event(line, limits, now)
                except EventError as error:
                    tally.refuse(f"{path}:{number}", error)
                else:
                    tally.good += 1
                    yield event
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error


def _check(path: Path, names: Sequence[str]) -> list[str]:
    """The known columns among those of a file."""
    if any(names.count(name) != 1 for name in REQUIRED):
        raise DataError(f"{path}: needs one column each of {', '.join(REQUIRED)}; it has {', '.join(names[:50])}")
    return [name for name in COLUMNS if names.count(name) == 1]


def _document(given: Mapping[str, Any], source: str, type_: str) -> bytes:
    """A CloudEvent of one row; EventError says what is wrong with its time or its value."""
    for name, value in given.items():
        if isinstance(value, bytes) or (
            isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)
        ):
            raise EventError(f"{name} is not UTF-8")
    moment = _time(given["time"])
    data: dict[str, Any] = {
        "type": given.get("type") or type_,
        "user": _id(given["user"]),
        "item": _id(given["item"]),
    }
    if given.get("ranking"):
        data["ranking"] = canonical(given["ranking"])
    if given.get("value") is not None:
        data["value"] = _number("value", given["value"])
    row = {**data, "user": canonical(data["user"]), "item": canonical(data["item"]), "time": moment}
    document = {
        "id": mmh3.hash_bytes(_encode(row)).hex(),
        "source": source,
        "specversion": "1.0",
        "type": "interaction",
        "time": moment,
        "data": data,
    }
    return _encode(document)


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, order="sorted")
    except (TypeError, ValueError) as error:
        raise EventError(str(error)) from None


def _id(value: Any) -> Any:
    """Whole numbers that a table holds as floats, as pandas does beside missing ones, are integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise EventError(f"{name} '{str(value)[:50]}' is no number") from None
    if not abs(number) < float("inf"):
        raise EventError(f"{name} is not finite")
    return number


def _time(value: Any) -> str:
    """RFC 3339. Numbers are seconds since 1970; text without an offset, and dates, are UTC."""
    if value is None or value == "":
        raise EventError("time is missing")
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    elif isinstance(value, date):
        moment = datetime(value.year, value.month, value.day, tzinfo=UTC)
    else:
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            moment = _iso(value)
        else:
            moment = _since_1970(seconds)
    return moment.isoformat().replace("+00:00", "Z")


def _since_1970(seconds: float) -> datetime:
    if not 0 <= seconds <= _MILLISECONDS:
        raise EventError(f"time {seconds:.0f} is no number of seconds since 1970; milliseconds are to be divided")
    return datetime.fromtimestamp(seconds, UTC)


def _iso(value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise EventError(f"time '{str(value)[:50]}' is neither seconds since 1970 nor ISO 8601") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


# ---------------------------------------------------------------------------------------------- tables
_Row = dict[str, Any] | str
"""Values by column; or why the row has none."""


def _parquet(path: Path) -> Iterator[_Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=_check(path, file.schema_arrow.names)):
            yield from _rows(batch)


def _arrow(path: Path) -> Iterator[_Row]:
    """A file, or a stream, of Arrow IPC."""
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                _check(path, stream.schema.names)
                for batch in stream:
                    yield from _rows(batch)
            return
        _check(path, reader.schema.names)
        for number in range(reader.num_record_batches):
            yield from _rows(reader.get_batch(number))


def _rows(batch: pa.RecordBatch) -> Iterator[_Row]:
    names = [name for name in COLUMNS if batch.schema.names.count(name) == 1]
    columns = [_values(batch.column(name)) for name in names]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    column.validate(full=True)
    return column.to_pylist()


def _csv(path: Path, delimiter: str = ",") -> Iterator[_Row]:
    """All as text, so that an id keeps its leading zeros; an empty field is none."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            names = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}: the first line cannot be read: {error}") from None
        wanted = {name: names.index(name) for name in _check(path, names)}
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield str(error)
                continue
            if len(values) == len(names):
                yield {name: values[place] or None for name, place in wanted.items()}
            elif values:
                yield f"{len(values)} fields in place of {len(names)}"


def _tsv(path: Path) -> Iterator[_Row]:
    return _csv(path, "\t")


_TABLES: dict[str, Callable[[Path], Iterator[_Row]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
    ".arrow": _arrow,
    ".feather": _arrow,
}
