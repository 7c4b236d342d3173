"""CloudEvents' binary mode for Kafka: the attributes in headers `ce_...`, the data as the record's value.

Source: CloudEvents 1.0, Kafka protocol binding, section 3.2. The server writes structured mode, as logs without headers
exist; other producers may write either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.components import LogRecord
from engine.events import Event, EventLimits, EventRefused, Reason, refusal

Headers = tuple[tuple[str, bytes], ...]

CONTENT_TYPE = "content-type"
_PREFIX = "ce_"
_JSON = ("application/json", "text/json")


def to_binary(event: Event) -> tuple[str, bytes, Headers]:
    """(key, value, headers) of a record. Extensions that are not text become JSON text."""
    document: dict[str, Any] = msgspec.json.decode(event.value)
    data = document.pop("data")
    content = document.pop("datacontenttype", "application/json")
    headers = [(CONTENT_TYPE, str(content).encode())]
    for name, value in document.items():
        if value is not None:
            headers.append((_PREFIX + name, value.encode() if isinstance(value, str) else msgspec.json.encode(value)))
    return event.key, msgspec.json.encode(data), tuple(headers)


def is_binary(headers: Headers) -> bool:
    """Whether a record's headers say that its value is data alone."""
    return any(name.startswith(_PREFIX) for name, _ in headers) and not content_type(headers).startswith(
        "application/cloudevents"
    )


def content_type(headers: Headers) -> str:
    """The media type, lower case, without parameters; '' where none is said."""
    for name, value in headers:
        if name.lower() == CONTENT_TYPE:
            return value.decode("latin-1").partition(";")[0].strip().lower()
    return ""


def from_binary(record: LogRecord, limits: EventLimits) -> bytes:
    """The same event in structured mode, its data known to be JSON; attributes are checked by who decodes it."""
    content = content_type(record.headers)
    if content and content not in _JSON and not content.endswith("+json"):
        raise EventRefused(Reason.SCHEMA, f"header {CONTENT_TYPE}: data of type '{content[:100]}'; only JSON is read")
    document: dict[str, Any] = _attributes(record.headers)
    try:
        document["data"] = msgspec.json.decode(record.value)
        return msgspec.json.encode(document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refusal(error, record.value, limits) from None


def _attributes(headers: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in headers:
        if not name.startswith(_PREFIX):
            continue
        attribute = name[len(_PREFIX) :]
        if attribute in found or attribute == "data":
            raise EventRefused(Reason.SCHEMA, f"header {name[:100]} has no place here, or stands twice")
        try:
            found[attribute] = value.decode()
        except UnicodeDecodeError:
            raise EventRefused(Reason.SCHEMA, f"header {name[:100]} is not UTF-8") from None
    return found
