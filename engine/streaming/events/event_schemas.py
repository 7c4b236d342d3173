"""JSON Schema files of the envelope and of the four kinds' data, made from the types. `docs/schemas/` holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from engine.events import KINDS, VERSION, Envelope

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """name of the file -> JSON Schema 2020-12. Its `$id` may stand in an event's `dataschema`."""
    types: dict[str, Any] = {"envelope": Envelope, **KINDS}
    return {
        f"{name}.json": {
            "$schema": DIALECT,
            "$id": f"urn:plexrank:{name}:v{VERSION}",
            **msgspec.json.schema(type_),
        }
        for name, type_ in types.items()
    }


def write_schemas(folder: Path) -> list[Path]:
    """Writes them -> the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, schema in schemas().items():
        path = folder / name
        path.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")
        written.append(path)
    return written
