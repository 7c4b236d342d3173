"""CloudEvents' binary mode: attributes in headers, data as the value; the same event either way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from event_records import LIMITS, NOW, click, decoded, ranking, reasons, record
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.components import LogRecord
from engine.events import decode_event
from engine.hashing import fingerprint
from engine.streaming.events.binary_mode import from_binary, to_binary


def binary(document: dict[str, Any]) -> LogRecord:
    key, value, headers = to_binary(decode_event(json.dumps(document).encode(), LIMITS, NOW))
    return record(value, key=key, headers=headers)


def test_attributes_become_headers_and_the_data_is_the_value() -> None:
    got = binary(click(traceparent="00-abc"))
    assert got.key == "u1"
    assert json.loads(got.value) == click()["data"]
    assert dict(got.headers) == {
        "content-type": b"application/json",
        "ce_id": b"e1",
        "ce_source": b"shop",
        "ce_specversion": b"1.0",
        "ce_type": b"interaction",
        "ce_time": b"2026-05-04T11:59:58.5Z",
        "ce_traceparent": b"00-abc",
    }


@pytest.mark.parametrize("document", [click(), ranking(), click(traceparent="00-abc", dataschema="urn:x:v1")])
def test_both_modes_say_the_same(document: dict[str, Any]) -> None:
    assert json.loads(from_binary(binary(document), LIMITS)) == document


def test_the_stream_reads_both_modes_side_by_side() -> None:
    got = decoded(binary(click()), click(id="e2"), binary(ranking()))
    assert got.interactions.event.tolist() == [fingerprint("4:shope1"), fingerprint("4:shope2")]
    assert (len(got.rankings), got.dead) == (1, [])
    item = click(type="item", data={"item": "i", "features": {"price": 2}})
    (event,) = decoded(binary(item)).items
    assert json.loads(event.value) == item, "an event that is handed on whole is in structured mode"


def test_structured_mode_may_say_so_in_a_header() -> None:
    headers = (("content-type", b"application/cloudevents+json; charset=utf-8"), ("ce_id", b"a copy"))
    assert len(decoded(record(click(), headers=headers)).interactions) == 1


GOOD = tuple(binary(click()).headers)


@pytest.mark.parametrize(
    ("headers", "value", "reason"),
    [
        (tuple(h for h in GOOD if h[0] != "ce_id"), b"{}", "schema"),
        ((*GOOD, ("ce_id", b"e2")), b"{}", "schema"),
        ((*GOOD, ("ce_data", b"{}")), b"{}", "schema"),
        ((*GOOD, ("ce_x", b"\xff")), b"{}", "schema"),
        ((("content-type", b"application/avro"), *GOOD[1:]), b"{}", "schema"),
        ((*GOOD, ("ce_dataschema", b"https://example.com/v9")), b"{}", "version"),
        (GOOD, b'{"type": "click", "user": "u"}', "schema"),
        (GOOD, b'{"type": "click", "user": "u", "item": "i"}, "id": "other"', "json"),
        (GOOD, b'{"type": NaN}', "nan"),
        (GOOD, b"[" * 50_000, "depth"),
    ],
)
def test_what_is_wrong_in_binary_mode_is_dead_with_its_own_bytes(headers: Any, value: bytes, reason: str) -> None:
    bad = record(value, headers=headers)
    got = decoded(bad)
    assert reasons(got) == [reason]
    assert (got.dead[0].value, got.dead[0].headers) == (value, headers)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["ce_id", "ce_type", "ce_time", "content-type", "x"]), st.binary(max_size=30))),
    st.binary(min_size=1, max_size=60),
)
def test_any_headers_and_bytes_become_dead_letters(headers: list[tuple[str, bytes]], value: bytes) -> None:
    got = decoded(record(value, headers=tuple(headers)))
    assert got.n == len(got.dead) == 1


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=256), st.text(min_size=1, max_size=64).map(lambda name: f"ü{name}"))
def test_any_id_and_type_of_interaction_make_the_round_trip(id_: str, type_: str) -> None:
    document = click(id=id_, data={"type": type_[:64], "user": "u", "item": "i"})
    if any(0xD800 <= ord(c) < 0xE000 for c in id_ + type_):
        return
    assert json.loads(from_binary(binary(document), LIMITS)) == document
