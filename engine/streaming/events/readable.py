"""Records of a log as people and programs read them: a line of a table, or a value of JSON."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import msgspec

from engine.components import LogRecord
from engine.streaming.events.binary_mode import content_type, is_binary

_MOST = 60


def document(record: LogRecord) -> dict[str, Any] | None:
    """The event as one JSON object, also where its attributes stand in headers; None for what is none."""
    try:
        value = msgspec.json.decode(record.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if is_binary(record.headers):
        attributes = {name[3:]: text.decode(errors="replace") for name, text in record.headers if name[:3] == "ce_"}
        return {**attributes, "data": value}
    return value if isinstance(value, dict) else None


def as_json(record: LogRecord) -> dict[str, Any]:
    """Position, key, time, headers and the event; what is no JSON, as base64 under `bytes`."""
    found: dict[str, Any] = {
        "partition": record.partition,
        "offset": record.offset,
        "key": record.key,
        "seconds": record.seconds,
        "headers": {name: value.decode(errors="replace") for name, value in record.headers},
    }
    event = document(record)
    if event is None:
        return {**found, "bytes": base64.b64encode(record.value).decode()}
    return {**found, "event": event}


def line(record: LogRecord) -> tuple[str, str, str, str, str, str]:
    """(time, place, kind, user, what, id) of a record, in words; all of it on one line."""
    place = f"{record.partition}:{record.offset}"
    event = document(record)
    if event is None:
        what = content_type(record.headers) or ("erased" if not record.value else "bytes")
        return _clock(record.seconds), place, what, short(record.key), f"{len(record.value):,} bytes", ""
    data = event.get("data")
    data = data if isinstance(data, dict) else {}
    kind = str(event.get("type", "")).rpartition(".")[2]
    when = str(event.get("time") or "")[:19].replace("T", " ") or _clock(record.seconds)
    return when, place, short(kind), short(data.get("user", "")), _what(kind, data), short(event.get("id", ""))


def _what(kind: str, data: dict[str, Any]) -> str:
    if kind == "interaction":
        shown = f" of {short(data['ranking'])}" if data.get("ranking") else ""
        return f"{short(data.get('type', ''))} {short(data.get('item', ''))}{shown}"
    if kind == "ranking":
        items = data.get("items")
        items = items if isinstance(items, list) else []
        first = ", ".join(short(item.get("id", "")) if isinstance(item, dict) else "?" for item in items[:3])
        version = f", {short(data['version'])}" if data.get("version") else ""
        return f"{data.get('shown') or len(items)} items: {first}{', ...' if len(items) > 3 else ''}{version}"
    features = data.get("features")
    names = ", ".join(short(name) for name in features) if isinstance(features, dict) else ""
    return f"{short(data['item'])}: {names}" if "item" in data else names


def short(value: object) -> str:
    """Short, and without what would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
