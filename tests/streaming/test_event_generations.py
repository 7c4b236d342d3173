"""Events outlive the programs that wrote them: newer readers read old events, and older readers newer ones."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from event_records import LIMITS, NOW, decoded

from engine.events import Arm, InteractionData, RankedItem, RankingData, decode_event
from engine.hashing import fingerprint

FIRST = {
    "interaction": '{"id":"1","source":"shop","specversion":"1.0","type":"interaction","time":"2026-05-04T11:00:00Z",'
    '"data":{"type":"click","user":"u","item":7,"ranking":"r"}}',
    "ranking": '{"id":"2","source":"shop","specversion":"1.0","type":"ranking","time":"2026-05-04T11:00:00Z",'
    '"data":{"request_id":"r","user":"u","items":[{"id":7,"score":0.5,"position":1,"propensity":1.0}]}}',
    "item": '{"id":"3","source":"shop","specversion":"1.0","type":"item","time":"2026-05-04T11:00:00Z",'
    '"data":{"item":7,"features":{"price":1.5}}}',
    "user": '{"id":"4","source":"shop","specversion":"1.0","type":"user","time":"2026-05-04T11:00:00Z",'
    '"data":{"user":"u","features":{"age":33}}}',
}
"""As the first generation of this program wrote them: golden, not to be changed."""

SECOND = {
    "interaction": '{"id":"1","source":"shop","specversion":"1.0","type":"interaction","time":"2026-05-04T11:00:00Z",'
    '"dataschema":"urn:plexrank:interaction:v1","data":{"type":"click","user":"u","item":7,"ranking":"r","value":9.5,'
    '"position":3}}',
    "ranking": '{"id":"2","source":"plexrank","specversion":"1.0","type":"ranking","time":"2026-05-04T11:00:00Z",'
    '"data":{"request_id":"r","user":"u","items":[{"id":7,"score":0.5,"position":1,"propensity":1.0}],"model":"ads",'
    '"version":"3f2a+1.7","arms":[{"experiment":"ranker","arm":"b"}],"user_features":{"age":33},'
    '"context":{"hour":12},"history":[5,"6"],"item_features":{"price":[1.5]},"shown":50}}',
}
"""With the optional fields of the second generation: golden as well."""


class OldItem(msgspec.Struct):
    id: str | int
    score: float | None = None
    position: int | None = None
    propensity: float | None = None


class OldRanking(msgspec.Struct):
    request_id: str
    user: str | int
    items: list[OldItem]


class OldInteraction(msgspec.Struct):
    type: str
    user: str | int
    item: str | int
    ranking: str | None = None


class OldEnvelope(msgspec.Struct):
    id: str
    source: str
    type: str
    data: msgspec.Raw
    specversion: str = "1.0"
    time: str | None = None


OLD = {"interaction": OldInteraction, "ranking": OldRanking}
"""The types of the first generation, as they were."""


@pytest.mark.parametrize("kind", list(FIRST))
def test_events_of_the_first_generation_are_read(kind: str) -> None:
    event = decode_event(FIRST[kind].encode(), LIMITS, NOW)
    assert event.kind == kind
    got = decoded(FIRST[kind].encode())
    assert (got.n, got.dead) == (1, [])


def test_what_the_first_generation_did_not_say_is_none() -> None:
    assert decode_event(FIRST["interaction"].encode(), LIMITS, NOW).data == InteractionData("click", "u", 7, "r")
    (data,) = decoded(FIRST["ranking"].encode()).rankings.data
    assert data == RankingData("r", "u", [RankedItem(7, 0.5, 1, 1.0)])
    assert (data.model, data.arms, data.history, data.item_features) == (None, [], None, None)


def test_events_of_the_second_generation_are_read_whole() -> None:
    interaction = decode_event(SECOND["interaction"].encode(), LIMITS, NOW)
    assert interaction.data == InteractionData("click", "u", 7, "r", 9.5, 3)
    (data,) = decoded(SECOND["ranking"].encode()).rankings.data
    assert data == RankingData(
        "r",
        "u",
        [RankedItem(7, 0.5, 1, 1.0)],
        "ads",
        "3f2a+1.7",
        [Arm("ranker", "b")],
        {"age": 33},
        {"hour": 12},
        [5, "6"],
        {"price": [1.5]},
        50,
    )


@pytest.mark.parametrize("kind", list(SECOND))
def test_a_reader_of_the_first_generation_reads_the_second(kind: str) -> None:
    def read(text: str) -> Any:
        return msgspec.json.decode(msgspec.json.decode(text, type=OldEnvelope).data, type=OLD[kind])

    assert read(SECOND[kind]) == read(FIRST[kind])


@pytest.mark.parametrize("kind", list(SECOND))
def test_fields_of_a_generation_to_come_are_ignored(kind: str) -> None:
    document = json.loads(SECOND[kind])
    document["subject"] = {"is": ["not", "known"]}
    document["data"]["new"] = {"a": [1, {"b": None}]}
    got = decoded(document)
    assert got.dead == []
    if kind == "ranking":
        assert got.rankings.data == decoded(json.loads(SECOND[kind])).rankings.data
    else:
        assert got.interactions.item.tolist() == [fingerprint(7)]


def test_nothing_is_filled_in_for_a_field_that_is_missing_or_of_another_type() -> None:
    for name, value in (("user", None), ("item", [7]), ("type", 1)):
        changed = json.loads(SECOND["interaction"])
        changed["data"][name] = value
        assert [dead.reason for dead in decoded(changed).dead] == ["schema"]
        del changed["data"][name]
        assert [dead.reason for dead in decoded(changed).dead] == ["schema"]


def test_what_is_written_is_read_by_its_own_types_and_says_nothing_that_was_not_said() -> None:
    data = RankingData("r", "u", [RankedItem("i")])
    assert json.loads(msgspec.json.encode(data)) == {"request_id": "r", "user": "u", "items": [{"id": "i"}]}
