"""Records become columns, whatever is among them: what cannot be read is dead, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from event_records import FUTURE, LIMITS, NOW, click, decoded, ranking, reasons, record
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.components import LogRecord
from engine.errors import EventError
from engine.events import RankedItem, Reason, decode_event, too_deep
from engine.hashing import fingerprint
from engine.streaming.events.decode import UNKNOWN_ITEM, _deeper, decode_records


def test_a_click_becomes_a_row_of_fingerprints() -> None:
    got = decoded(click(), click(id="e2", data={"type": "buy", "user": 7, "item": 42}))
    rows = got.interactions
    assert (got.n, len(rows), got.dead) == (2, 2, [])
    assert rows.event.tolist() == [fingerprint("4:shope1"), fingerprint("4:shope2")]
    assert rows.request.tolist() == [fingerprint("r1"), 0], "no ranking is named by the second"
    assert rows.item.tolist() == [fingerprint("i1"), fingerprint("42")]
    assert rows.user.tolist() == [fingerprint("u1"), fingerprint("7")]
    assert [rows.type[code] for code in rows.code] == ["click", "buy"]
    assert rows.seconds.tolist() == [NOW - 1.5, NOW - 1.5]
    assert (rows.event.dtype, rows.code.dtype, rows.seconds.dtype) == (np.int64, np.int16, np.float64)
    assert got.newest == NOW - 1.5


def test_a_ranking_keeps_what_was_shown_and_what_it_was_scored_with() -> None:
    got = decoded(ranking())
    (data,) = got.rankings.data
    assert data.items == [RankedItem("i1", 0.75, 1, 1.0), RankedItem("i2", -1.5, 2, 0.25)]
    assert (data.model, data.version, data.history) == ("ads", "3f2a+1.7", ["i9", "i8"])
    assert (data.arms[0].experiment, data.arms[0].arm) == ("ranker", "b")
    assert data.user_features == {"age": 33, "tags": ["a", None]}
    assert data.context == {"hour": 12, "mobile": True}
    assert data.item_features == {"price": [9.5, None]}
    assert got.rankings.request.tolist() == [fingerprint("r1")]
    assert got.rankings.event.tolist() == [fingerprint("4:shopr")]


def test_items_and_users_stay_whole_and_in_order() -> None:
    got = decoded(
        click(id="a", type="item", data={"item": "i1", "features": {"price": 1.5}}),
        click(id="b", type="user", data={"user": "u1", "features": {"age": None}}),
        click(id="c", type="shop.item", data={"item": "i2", "features": {}}),
    )
    assert [(e.id, e.key, e.seconds) for e in got.items] == [
        ("a", "\x00item\x00i1", int(NOW) - 2),
        ("c", "\x00item\x00i2", int(NOW) - 2),
    ]
    assert [(e.id, e.kind, e.data.features) for e in got.users] == [("b", "user", {"age": None})]


def test_nothing_is_decoded_to_nothing() -> None:
    got = decoded()
    assert (got.n, len(got.rankings), len(got.interactions), got.items, got.users, got.dead) == (0, 0, 0, [], [], [])
    assert math.isnan(got.newest)


def test_an_empty_record_is_a_tombstone_and_no_event() -> None:
    got = decoded(b"", click(), record(b"", 7, headers=(("ce_id", b"e"),)))
    assert (got.n, len(got.interactions), got.dead) == (1, 1, [])


def deep(levels: int) -> Any:
    nested: Any = "x"
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (b"not JSON", "json"),
        (b"\xff\xfe", "json"),
        (b'{"id":"\xed\xa0\x80"}', "json"),
        (b"null", "schema"),
        (b"[]", "schema"),
        (click(id=""), "schema"),
        (click(type="click"), "schema"),
        (click(type="interaction\n"), "schema"),
        (click(data={"type": "click", "user": "u"}), "schema"),
        (click(data={"type": "click", "user": "u", "item": 1.5}), "schema"),
        (click(data={"type": "click", "user": "u", "item": "i", "position": 0}), "schema"),
        (click(time="2026-05-04T11:00:00"), "schema"),
        (ranking(items="i1"), "schema"),
        (ranking(item_features={"price": [1.0]}), "schema"),
        (ranking(items=[{"id": "i", "propensity": 0}], item_features=None), "schema"),
        (json.dumps(ranking(items=[{"id": "i", "score": math.nan}], item_features=None)).encode(), "nan"),
        (json.dumps(click(data={"type": "c", "user": "u", "item": "i", "value": math.inf})).encode(), "nan"),
        (json.dumps(click()).encode().replace(b'"u1"', b"1e999"), "nan"),
        (click(dataschema="https://example.com/events/v2"), "version"),
        (click(dataschema="urn:plexrank:interaction:v2", data={"who": 1}), "version"),
        (click(time="1969-12-31T23:59:59Z"), "past"),
        (click(time="0001-01-01T00:00:00+14:00"), "past"),
        (click(time="2026-05-04T12:05:00Z"), "future"),
        (click(time="9999-12-31T23:59:59Z"), "future"),
        (click(data={"type": "click", "user": "u" * 257, "item": "i"}), "id"),
        (click(data={"type": "click", "user": "u", "item": "ü" * 129}), "id"),
        (click(data={"type": "click", "user": "u\x00", "item": "i"}), "id"),
        (ranking(items=[{"id": "a\nb"}], item_features=None), "id"),
        (ranking(history=["a\x7fb"]), "id"),
        (click(type="item", data={"item": "\x01", "features": {}}), "id"),
        (click(type="user", time="2026-05-05T12:00:00Z", data={"user": "u", "features": {}}), "future"),
        (click(extra=deep(16)), "depth"),
        (b"[" * 100_000, "depth"),
        (b"\xff\xff\xff\xff and so on", "arrow"),
    ],
)
def test_only_the_poison_is_dead_and_keeps_its_place_and_bytes(poison: Any, reason: str) -> None:
    bad = record(poison, 11, partition=3, key="someone", headers=(("traceparent", b"00"),))
    got = decoded(click(), ranking(), bad, click(id="e3"))
    (dead,) = got.dead
    assert (dead.reason, dead.partition, dead.offset, dead.key) == (reason, 3, 11, "someone")
    assert (dead.value, dead.headers) == (bad.value, bad.headers)
    assert dead.detail
    assert (got.n, len(got.interactions), len(got.rankings)) == (4, 2, 1)
    assert got.interactions.record.tolist() == [0, 3]


@pytest.mark.parametrize("same", ["urn:plexrank:interaction:v1", "https://example.com/s", "https://example.com/v2/s"])
def test_a_version_that_is_known_or_not_said_is_read(same: str) -> None:
    assert decoded(click(dataschema=same)).dead == []


def test_two_halves_of_an_event_in_two_records_are_two_dead_letters() -> None:
    whole = json.dumps(click()).encode()
    assert reasons(decoded(whole[:40], whole[40:])) == ["json", "json"]
    assert reasons(decoded(whole + b"," + whole)) == ["json"]


def test_the_log_s_time_says_what_lies_in_the_future_so_that_a_replay_finds_the_same() -> None:
    event = click(time="2026-05-04T11:00:00Z")
    taken = NOW - 7200  # the log took it an hour before it says that it happened
    for now in (NOW - 7200, NOW, NOW + 1e6):
        assert reasons_at(record(event, seconds=taken), now) == ["future"]
    assert reasons_at(record(event, seconds=None), NOW) == []
    wrong_clock = record(click(time="2026-05-05T12:00:00Z"), seconds=NOW + 86_400)
    assert reasons_at(wrong_clock, NOW) == ["future"], "a log's clock that is ahead itself says nothing"


def reasons_at(one: LogRecord, now: float) -> list[str]:
    return reasons(decode_records([one], LIMITS, now, FUTURE))


def test_without_a_time_it_happened_when_the_log_took_it() -> None:
    timeless = click()
    del timeless["time"]
    assert decoded(timeless).interactions.seconds.tolist() == [NOW - 1]
    assert decoded(record(timeless, seconds=None)).interactions.seconds.tolist() == [NOW]


def test_whoever_has_the_catalogue_finds_the_record_of_an_unknown_item() -> None:
    records = [record(b"x", 4), record(click(), 5), record(ranking(), 6), record(click(id="e2"), 7)]
    got = decode_records(records, LIMITS, NOW, FUTURE)
    assert [records[n].offset for n in got.interactions.record] == [5, 7]
    assert [records[n].offset for n in got.rankings.record] == [6]
    assert UNKNOWN_ITEM is Reason.UNKNOWN_ITEM


# -------------------------------------------------------------------------------------------------- any bytes
IDS = st.text(min_size=1, max_size=300) | st.integers(-(2**63), 2**63 - 1)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_become_dead_letters_and_nothing_is_raised(values: list[bytes]) -> None:
    got = decoded(*values)
    assert got.n == len(got.dead) == sum(bool(value) for value in values)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_event_is_judged_as_at_the_door(data: st.DataObject) -> None:
    raw = bytearray(json.dumps(data.draw(st.sampled_from([click(), ranking()]))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    agrees(bytes(raw))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "source", "specversion", "type", "time", "dataschema"]), ANY), ANY)
def test_any_json_is_judged_as_at_the_door(part: dict[str, Any], data: Any) -> None:
    for document in (part, click(**part), click(data=data), ranking(context=data), click(extra=data), data):
        with contextlib.suppress(UnicodeEncodeError):
            agrees(json.dumps(document, ensure_ascii=False).encode())


@settings(max_examples=300, deadline=None)
@given(IDS, IDS, st.text(max_size=300) | st.none())
def test_any_ids_are_judged_as_at_the_door(user: str | int, item: str | int, request: str | None) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        document = click(data={"type": "click", "user": user, "item": item, "ranking": request})
        agrees(json.dumps(document, ensure_ascii=False).encode())


def agrees(raw: bytes) -> None:
    """The one-by-one decoder of the server is the reference; it also looks into what is ignored here."""
    got, event, refused = decoded(raw), None, ""
    try:
        event = decode_event(raw, LIMITS, NOW, FUTURE)
    except EventError as error:
        refused = str(error)[:500]
    if event is None:
        assert all(d.detail == refused or d.reason in (Reason.FUTURE, Reason.PAST, Reason.ID) for d in got.dead)
        return
    assert got.dead == []
    if event.kind == "interaction":
        assert got.interactions.item.tolist() == [fingerprint(event.data.item)]  # type: ignore[union-attr]
        assert got.interactions.user.tolist() == [fingerprint(event.key)]
        assert got.interactions.event.tolist() == [fingerprint(f"{len(event.source)}:{event.source}{event.id}")]
        assert got.interactions.request[0] == (fingerprint(r) if (r := event.data.ranking) else 0)  # type: ignore[union-attr]
    elif event.kind == "ranking":
        assert got.rankings.data == [event.data]


@settings(max_examples=200, deadline=None)
@given(ANY, st.integers(1, 6))
def test_depth_is_counted_in_bytes_as_it_is_in_objects(value: Any, depth: int) -> None:
    for text in (json.dumps(value), json.dumps({"[{": value, '"': ["]]\\"]})):
        assert _deeper(text.encode(), depth) == too_deep(json.loads(text), depth)
