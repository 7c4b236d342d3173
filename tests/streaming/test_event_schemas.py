"""The JSON Schema files say what the types say; an independent validator judges the same events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from event_records import click, decoded, ranking

from engine.streaming.events.event_schemas import schemas, write_schemas

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"


def test_the_files_that_are_checked_in_are_fresh(tmp_path: Path) -> None:
    for path in write_schemas(tmp_path):
        there = FOLDER / path.name
        assert there.read_text() == path.read_text(), (
            f"{there} is stale: run write_schemas(Path('docs/schemas')) of engine.streaming.events.event_schemas"
        )
    assert sorted(p.name for p in FOLDER.iterdir()) == sorted(schemas())


GOOD = [
    click(),
    click(data={"type": "rating", "user": 1, "item": 2, "value": 4.5, "position": 3}, dataschema="urn:x:v1"),
    click(traceparent="00-abc"),
    ranking(),
    ranking(model=None, user_features=None, history=None, item_features=None, arms=[]),
    click(type="shop.item", data={"item": "i", "features": {"price": 9.5, "tags": ["a", None], "gone": None}}),
    click(type="user", data={"user": "u", "features": {}, "from a newer writer": 1}),
]
BAD = [
    click(id=""),
    click(source=None),
    click(specversion="0.3"),
    click(type="click"),
    click(data=[]),
    click(dataschema=1),
    click(data={"type": "click", "user": "u"}),
    click(data={"type": "click", "user": "u", "item": 1.5}),
    click(data={"type": "click", "user": "u", "item": "i", "position": 0}),
    click(data={"type": "click", "user": "u", "item": "i", "value": "9"}),
    click(data={"type": "", "user": "u", "item": "i"}),
    ranking(items=[{"id": "i", "propensity": 0}], item_features=None),
    ranking(arms=[{"experiment": "x"}]),
    ranking(context={"a": {"b": 1}}),
    ranking(history="i1"),
    click(type="item", data={"item": "i", "features": []}),
]


def fits(document: dict[str, Any]) -> bool:
    kind = str(document["type"]).rpartition(".")[2]
    whole, data = schemas()["envelope.json"], schemas().get(f"{kind}.json", {})
    valid = jsonschema_rs.validator_for(whole).is_valid(document)
    return valid and jsonschema_rs.validator_for(data).is_valid(document["data"])


@pytest.mark.parametrize("document", GOOD)
def test_what_is_read_fits_the_schema(document: dict[str, Any]) -> None:
    assert fits(document)
    assert decoded(document).dead == []


@pytest.mark.parametrize("document", BAD)
def test_what_is_dead_for_its_form_does_not_fit_the_schema(document: dict[str, Any]) -> None:
    assert not fits(document)
    assert [dead.reason for dead in decoded(document).dead] == ["schema"]


def test_each_schema_names_its_dialect_and_version() -> None:
    for name, schema in schemas().items():
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["$id"] == f"urn:plexrank:{name.removesuffix('.json')}:v1"
        jsonschema_rs.meta.validate(schema)
        assert json.loads(json.dumps(schema)) == schema
