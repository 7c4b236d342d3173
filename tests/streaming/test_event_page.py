"""docs/events.md: its examples are events, its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from event_records import LIMITS, NOW

from engine.components import LogRecord
from engine.events import Event, Reason, decode_event
from engine.streaming.events.arrow_events import OPTIONAL, REQUIRED
from engine.streaming.events.decode import decode_records

PAGE = (Path(__file__).parents[2] / "docs" / "events.md").read_text()


def examples() -> list[Event]:
    return [decode_event(text.encode(), LIMITS, NOW) for text in re.findall(r"```json\n(.*?)```", PAGE, re.S)]


def test_each_kind_has_an_example_that_is_read() -> None:
    assert [event.kind for event in examples()] == ["interaction", "ranking", "item", "user"]


def test_the_examples_use_no_field_that_the_types_do_not_know() -> None:
    for event in examples():
        document = msgspec.json.decode(event.value)
        said = {name for name, value in document["data"].items() if value not in (None, [])}
        assert said <= set(type(event.data).__struct_fields__)


def test_the_example_of_a_batch_is_a_batch() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, list[bytes]] = {}
    exec(code, names)
    now = 1e11
    got = decode_records([LogRecord(0, 0, "", value) for value in names["records"]], LIMITS, now, 0.0)
    assert (got.n, len(got.interactions), got.dead) == (2, 2, [])


def test_every_reason_and_every_column_is_on_the_page() -> None:
    words = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert {str(reason) for reason in Reason} <= words
    assert {name for columns in (*REQUIRED.values(), *OPTIONAL.values()) for name in columns} <= words
