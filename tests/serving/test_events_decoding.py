"""Events at the door: what is taken, what is refused and why, and that an event counts once."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EventError
from engine.events import Dedupe, EventLimits, InteractionData, decode_event, item_key, too_deep

LIMITS = EventLimits(id_bytes=256, depth=16)
NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC).timestamp()


def event(**changes: Any) -> dict[str, Any]:
    whole = {
        "id": "e1",
        "source": "shop",
        "specversion": "1.0",
        "type": "interaction",
        "time": "2026-05-04T11:59:58.5Z",
        "data": {"type": "click", "user": "u1", "item": "i1"},
    }
    return whole | changes


def decode(document: Any) -> Any:
    return decode_event(json.dumps(document).encode(), LIMITS, NOW)


def test_a_click_is_read_with_its_time_and_keeps_its_extensions() -> None:
    got = decode(event(traceparent="00-abc", dataschema="https://example.com/s"))
    assert (got.kind, got.key, got.seconds) == ("interaction", "u1", int(NOW) - 2)
    assert got.data == InteractionData("click", "u1", "i1")
    assert json.loads(got.value)["traceparent"] == "00-abc"


def test_without_a_time_the_event_happened_now() -> None:
    document = event()
    del document["time"], document["specversion"]
    got = decode(document)
    assert got.seconds == int(NOW)
    stored = json.loads(got.value)
    assert stored["time"] == "2026-05-04T12:00:00Z"
    assert stored["specversion"] == "1.0"
    assert decode_event(got.value, LIMITS, NOW) == got, "what is stored reads as the same event"


@pytest.mark.parametrize("kind", ["interaction", "com.example.shop.interaction", "plexrank.interaction"])
def test_the_kind_is_the_last_word_of_the_type(kind: str) -> None:
    assert decode(event(type=kind)).kind == "interaction"


def test_integers_are_ids_too() -> None:
    got = decode(event(data={"type": "click", "user": 7, "item": 42}))
    assert got.key == "7"


def test_the_four_kinds_have_their_keys() -> None:
    assert decode(event(type="user", data={"user": "u", "features": {"age": 3, "tags": ["a", None]}})).key == "u"
    assert decode(event(type="item", data={"item": "i", "features": {}})).key == item_key("i")
    ranking = {"request_id": "r", "user": "u", "items": [{"id": "i", "score": 0.5, "position": 1, "propensity": 1.0}]}
    assert decode(event(type="ranking", data=ranking)).key == "u"


DEEP: Any = "x"
for _ in range(20):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"id": ""}, r"\$\.id"),
        ({"id": 5}, r"Expected `str`, got `int` - at `\$\.id`"),
        ({"id": "x" * 257}, r"length <= 256"),
        ({"source": None}, r"\$\.source"),
        ({"specversion": "0.3"}, r"\$\.specversion"),
        ({"type": "click"}, r"\$\.type"),
        ({"type": "interaction.v2"}, r"\$\.type"),
        ({"time": "yesterday"}, r"\$\.time"),
        ({"time": "2026-05-04T11:00:00"}, r"timezone"),
        ({"time": "2026-05-06T12:00:00Z"}, "a day ahead"),
        ({"time": "1969-12-31T23:59:59Z"}, "before 1970"),
        ({"data": None}, r"\$\.data"),
        ({"data": {"type": "click", "user": "u"}}, "missing required field `item`"),
        ({"data": {"type": "click", "user": "", "item": "i"}}, r"\$\.user"),
        ({"data": {"type": "click", "user": 1.5, "item": "i"}}, r"\$\.user"),
        ({"data": {"type": "click", "user": "u" * 257, "item": "i"}}, "data.user is longer than 256 bytes"),
        ({"data": {"type": "click", "user": "ü" * 129, "item": "i"}}, "data.user is longer than 256 bytes"),
        ({"data": {"type": "click", "user": "u\x00v", "item": "i"}}, "data.user holds control characters"),
        ({"data": {"type": "click", "user": "u", "item": "a\nb"}}, "data.item holds control characters"),
        ({"data": {"type": "click", "user": 2**70, "item": "i"}}, r"\$\.user"),
        ({"type": "user", "data": {"user": "u", "features": {"a": {"b": 1}}}}, r"\$\.features"),
        ({"extra": DEEP}, "nested deeper than 16"),
    ],
)
def test_what_is_wrong_with_an_event_is_said(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(EventError, match=why):
        decode(event(**changes))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"{",
        b'{"id":}',
        b"\xff\xfe",
        b'{"id":"\xed\xa0\x80"}',
        b'{"id":"\\ud800"}',
        b'{"data":{"x":NaN}}',
        b'{"data":{"x":Infinity}}',
        b'{"data":{"x":1e999}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_event_at_all_is_refused(raw: bytes) -> None:
    with pytest.raises(EventError):
        decode_event(raw, LIMITS, NOW)


def test_random_bytes_are_refused_and_nothing_else_happens() -> None:
    rng = random.Random(1)
    whole = json.dumps(event()).encode()
    for _ in range(20_000):
        raw = rng.randbytes(rng.randrange(40))
        with pytest.raises(EventError):
            decode_event(raw, LIMITS, NOW)
        broken = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        with contextlib.suppress(EventError):
            decode_event(bytes(broken), LIMITS, NOW)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "source", "specversion", "type", "time", "data"]), JSON), JSON)
def test_any_json_is_an_event_or_an_event_error(part: dict[str, Any], data: Any) -> None:
    for document in (part, event(**part), event(data=data), data):
        with contextlib.suppress(EventError):
            decode_event(json.dumps(document).encode("utf-8", "surrogatepass"), LIMITS, NOW)


def test_depth_is_counted_without_recursion() -> None:
    nested: Any = 1
    for _ in range(50_000):
        nested = {"a": nested}
    assert too_deep(nested, 16)
    assert not too_deep([[[1]]], 3)
    assert too_deep([[[1]]], 2)


# -------------------------------------------------------------------------------------------------- dedupe
def test_an_event_is_written_once_also_within_one_batch() -> None:
    seen = Dedupe()
    written: list[list[int]] = []
    pairs = [("s", "1"), ("s", "2"), ("s", "1"), ("t", "1")]
    assert seen.once(pairs, written.append) == [True, True, False, True]
    assert seen.once(pairs, written.append) == [False] * 4
    assert written == [[0, 1, 3]]


def test_a_failed_write_leaves_the_event_new() -> None:
    seen = Dedupe()

    def fail(_: list[int]) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        seen.once([("s", "1")], fail)
    assert seen.once([("s", "1")], lambda _: None) == [True]


def test_the_oldest_are_forgotten_beyond_the_capacity() -> None:
    seen = Dedupe(capacity=2)
    for name in "abc":
        seen.once([("s", name)], lambda _: None)
    assert len(seen) == 2
    assert seen.once([("s", "c"), ("s", "a")], lambda _: None) == [False, True]


def test_a_twin_waits_for_the_event_that_is_being_written() -> None:
    seen = Dedupe()
    writing, release = threading.Event(), threading.Event()
    outcome: list[Any] = []

    def slow(_: list[int]) -> None:
        writing.set()
        release.wait(5)

    first = threading.Thread(target=lambda: outcome.append(seen.once([("s", "1")], slow)))
    first.start()
    writing.wait(5)
    twin = threading.Thread(target=lambda: outcome.append(seen.once([("s", "1")], slow)))
    twin.start()
    time.sleep(0.05)
    assert outcome == [], "the twin says nothing before the outcome is known"
    release.set()
    first.join()
    twin.join()
    assert sorted(outcome) == [[False], [True]]


def test_a_twin_of_a_failed_event_is_no_duplicate() -> None:
    seen = Dedupe()
    writing, release = threading.Event(), threading.Event()

    def fail(_: list[int]) -> None:
        writing.set()
        release.wait(5)
        raise EventError("disk full")

    errors: list[str] = []

    def attempt() -> None:
        try:
            seen.once([("s", "1")], fail)
        except EventError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    threads[0].start()
    writing.wait(5)
    threads[1].start()
    time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join()
    assert errors == ["disk full", "disk full"]


def test_a_twin_does_not_wait_for_ever() -> None:
    seen = Dedupe()
    writing, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: seen.once([("s", "1")], lambda _: (writing.set(), release.wait(5))))
    thread.start()
    writing.wait(5)
    with pytest.raises(EventError, match="send it again"):
        seen.once([("s", "1")], lambda _: None, patience=0.05)
    release.set()
    thread.join()
