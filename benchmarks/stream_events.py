"""A dataset's rows, in the order of time, as the events that a server would have written.

A page (one user, one moment) is a ranking with the features that its request had; a positive row is an interaction
that names it. Histories hold positives of strictly earlier moments, newest first.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.components import Dataset, EventLog
from engine.config import Config
from engine.plugins import Plugins
from engine.schema import FeatureSpec

SOURCE = "benchmark"
_CHUNK = 2000


def events(config: Config, plugins: Plugins, cache: Path, *, after: float, most: int | None = None) -> Iterator[Any]:
    """(key, bytes) of the rows behind the first `after` share of all, at most `most` rows: rankings at their page's
    moment, interactions a second later. Rows before count for the histories."""
    rows, users = _rows(config, plugins, cache)
    first = int(after * len(rows))
    last = len(rows) if most is None else min(len(rows), first + most)
    label = next(iter(config.data.labels.values()))
    length = max((f.max_length for f in config.features if f.kind == "sequence"), default=0)
    sided = _sided(config)
    past: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=max(1, length)))
    action = config.serving.positive_interactions[0]
    waiting: list[tuple[float, int, str, bytes]] = []  # interactions, by their time
    page: list[dict[str, Any]] = []
    for number, row in enumerate([*rows[:last], None]):
        if page and (row is None or (row["user"], row["time"]) != (page[0]["user"], page[0]["time"])):
            user, moment = page[0]["user"], page[0]["time"]
            liked = [r["item"] for r in page if _positive(r, label.at_least)]
            if number > first:
                while waiting and waiting[0][0] <= moment:
                    yield heapq.heappop(waiting)[2:]
                request = f"page-{number}"
                yield user, _ranking(request, page, moment, sided, users.get(user, {}), past[user])
                for place, item in enumerate(liked):
                    data = {"type": action, "user": user, "item": item, "ranking": request}
                    event = _event(f"{request}-{place}", "interaction", moment + 1, data)
                    heapq.heappush(waiting, (moment + 1, number * 1000 + place, user, event))
            past[user].extendleft(liked)
            page = []
        if row is not None:
            page.append(row)
    while waiting:
        yield heapq.heappop(waiting)[2:]


def write(log: EventLog, stream: Iterator[tuple[str, bytes]]) -> int:
    """Appends them all -> how many."""
    count = 0
    chunk: list[tuple[str, bytes]] = []
    for event in stream:
        chunk.append(event)
        if len(chunk) == _CHUNK:
            log.append(chunk)
            count += len(chunk)
            chunk = []
    if chunk:
        log.append(chunk)
    return count + len(chunk)


def _rows(config: Config, plugins: Plugins, cache: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows oldest first, with `user`, `item`, `time` and `value` beside their columns; user -> its columns."""
    assert config.data.dataset is not None
    cls: type[Dataset] = plugins.get("datasets", config.data.dataset.name)
    files = cls(cls.Options(**config.data.dataset.options)).prepare(cache)
    table = pa.concat_tables([pq.read_table(path) for path in files.interactions])
    data = config.data
    label = next(iter(data.labels.values()))
    order = table.append_column("_row", pa.array(range(len(table))))
    table = order.sort_by([(data.time, "ascending"), (data.user, "ascending"), ("_row", "ascending")])
    named = {"user": data.user, "item": data.item, "time": data.time, "value": label.column}
    rows = table.to_pylist()
    for row in rows:
        row.update({name: row[column] for name, column in named.items() if column is not None})
        row["user"], row["item"], row["time"] = str(row["user"]), str(row["item"]), float(row["time"])
    people = pq.read_table(files.users).to_pylist() if files.users else []
    return rows, {str(row[data.user]): row for row in people}


def _sided(config: Config) -> dict[str, list[FeatureSpec]]:
    """Single features of the user and of the context."""
    single = [f for f in config.features if f.kind != "sequence"]
    return {side: [f for f in single if f.side == side] for side in ("user", "context")}


def _positive(row: dict[str, Any], at_least: float | None) -> bool:
    return bool(row["value"]) if at_least is None else row["value"] >= at_least


def _ranking(
    request: str,
    page: list[dict[str, Any]],
    moment: float,
    sided: dict[str, list[FeatureSpec]],
    user: dict[str, Any],
    past: Iterable[str],
) -> bytes:
    values = {f.name: user.get(f.column) for f in sided["user"] if f.column in user}
    values |= {f.name: page[0]["user"] for f in sided["user"] if f.column not in user}
    data = {
        "request_id": request,
        "user": page[0]["user"],
        "items": [{"id": row["item"], "position": place + 1} for place, row in enumerate(page)],
        "user_features": values,
        "context": {f.name: page[0][f.column] for f in sided["context"] if f.column in page[0]},
        "history": list(past),
    }
    return _event(request, "ranking", moment, data)


def _event(name: str, kind: str, moment: float, data: dict[str, Any]) -> bytes:
    time = datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
    return msgspec.json.encode(
        {"specversion": "1.0", "id": name, "source": SOURCE, "type": kind, "time": time, "data": data}
    )
