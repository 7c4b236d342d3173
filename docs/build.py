"""Writes what of docs/ comes from the code: plugins, configuration, errors, HTTP API, events. `make docs`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from fastapi import FastAPI
from pydantic import BaseModel

from engine import __version__, errors, hookspecs
from engine.components import KINDS
from engine.config import COMPONENT_KINDS, Config
from engine.document import key
from engine.plugins import MOMENTS, Plugins
from engine.schema import FeatureSpec
from engine.streaming.events.event_schemas import write_schemas
from serving.errors import PROBLEMS
from serving.openapi import publish
from serving.routes import events, explain, health, models, oip, rank, users

FOLDER = Path(__file__).parent
INT64 = 2**63 - 1
"""Bounds that only say `64 bits` are not shown."""
NOTE = "<!-- Written by `make docs` from the code; change the code instead. -->\n"


# ---------------------------------------------------------------------------------------------- plugins
def plugins_page() -> str:
    """Every built-in plugin with its options, and every hook."""
    plugins = Plugins()
    lines = [
        "# Plugins\n",
        NOTE,
        "Name a plugin in the configuration by its kind's place and its name. `plexrank plugins` lists what is",
        "installed on your machine, other people's packages included. [How to write one](writing-a-plugin.md).\n",
    ]
    places: dict[str, list[str]] = {}
    for place, kind in COMPONENT_KINDS.items():
        named = key(place).replace("feedback.*", "feedback.TASK").replace(".*", "[]")
        places.setdefault(kind, []).append(f"`{named}`")
    rows = [row for row in plugins.table() if row.distribution == "plexrank"]
    for kind in KINDS:
        lines += [
            f"## {kind}\n",
            f"{_first(inspect.getdoc(getattr(hookspecs, kind)))} Named in {', '.join(places[kind])}.\n",
        ]
        mine = [row for row in rows if row.kind == kind]
        lines += _table(["name", "what it is", "module"], ([f"`{r.name}`", r.summary, f"`{r.module}`"] for r in mine))
        for row in mine:
            options = plugins.get(kind, row.name).Options
            if options.model_fields:
                lines += [
                    f"Options of `{row.name}`:\n",
                    *_table(["option", "type", "default", "what it is"], _fields(options)),
                ]
            for part, model in _parts(options):
                lines += [
                    f"`{part}` of `{row.name}`: {_first(inspect.getdoc(model))}\n",
                    *_table(["option", "type", "default", "what it is"], _fields(model)),
                ]
    lines += ["## Moment hooks\n", "Modules listed under `plugins` in the configuration hear these.\n"]
    hooks = [
        (f"`{m}{inspect.signature(getattr(hookspecs, m))}`", _first(inspect.getdoc(getattr(hookspecs, m))))
        for m in MOMENTS
    ]
    return "\n".join([*lines, *_table(["hook", "when, and what it answers"], hooks)])


def _parts(options: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections within a plugin's options, but for the options of another plugin."""
    for name, field in options.model_fields.items():
        model = _model_in(field.annotation)
        if model is not None and not model.__qualname__.endswith(".Options"):
            yield f"{name}.NAME" if "dict" in str(field.annotation) else name, model


# ---------------------------------------------------------------------------------------- configuration
def config_page() -> str:
    """Every key of the YAML file."""
    lines = [
        "# Configuration\n",
        NOTE,
        "One YAML file describes a model from its data to its service. Keys that are not listed here are errors, named",
        "with file, line and the nearest right name. `plexrank validate CONFIG --data` checks a file and its data.",
        "`--set KEY=VALUE` overrides one key for one run: `--set training.epochs=3`, `--set features[2].dim=8`.",
        "A default that names a plugin comes from the entry-point group `plexrank.defaults`.\n",
    ]
    for place, model in _sections(Config, ""):
        about = _first(inspect.getdoc(model))
        lines += [f"## {f'`{place}`' if place else 'The file'}\n", f"{about}\n"]
        lines += _table(["key", "type", "default", "what it is"], _fields(model))
    return "\n".join(lines)


def _sections(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None and (inner is FeatureSpec or inner.__name__.endswith(("Config", "Use"))):
            many = "[]" if "list" in str(field.annotation) else ".TASK" if "dict" in str(field.annotation) else ""
            below = f"{place}.{name}{many}".lstrip(".")
            if inner.__name__ != "ComponentConfig":
                yield from _sections(inner, below)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def _fields(model: type[BaseModel]) -> Iterator[list[str]]:
    """name, type, default and description of each field."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        property_ = schema["properties"][name]
        yield [f"`{name}`", _type(property_), _default(field), field.description or _inner_description(field)]


def _inner_description(field: Any) -> str:
    model = _model_in(field.annotation)
    return _first(inspect.getdoc(model)) if model is not None else ""


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return _named(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        parts = list(dict.fromkeys(_type(part) for part in schema["anyOf"]))
        return " or ".join(parts) if len(parts) <= 3 else "any value"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {_type(inner)}" if isinstance(inner, dict) and inner else "mapping"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    limits = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    bounds = [f"{sign} {schema[name]:,}" for name, sign in limits if abs(schema.get(name, INT64)) < INT64]
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()


def _named(model: str) -> str:
    return {
        "ComponentConfig": "plugin",
        "EmbeddingConfig": "plugin",
        "SourceUse": "plugin",
        "FeatureSpec": "feature",
    }.get(model, "section")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{item.name}`" for item in value)
    if isinstance(value, BaseModel):
        return f"`{value.name}`" if hasattr(value, "name") else "as below"
    if value is None or value == "":
        return "`null`" if value is None else "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{list(value) if isinstance(value, tuple) else value}`"


# ------------------------------------------------------------------------------------------------ errors
def errors_page() -> str:
    """Every error class and every HTTP problem."""
    lines = [
        "# Errors\n",
        NOTE,
        "An error says what was wrong, where, and what to do. The command line prints it on stderr and ends with 1;",
        "wrong usage ends with 2. `PLEXRANK_DEBUG=1` shows the traceback.\n",
    ]
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PlexrankError)]
    lines += _table(
        ["class", "when"], ([f"`{c.__name__}`", " ".join((inspect.getdoc(c) or "").split())] for c in classes)
    )
    lines += [
        "## Over HTTP\n",
        "Every error is `application/problem+json` (RFC 9457). `type` is `/docs#problem-NAME`.\n",
        *_table(["status", "name", "what it is"], ([str(s), f"`{n}`", f"{t}."] for s, (n, t) in PROBLEMS.items())),
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- API
def api_page() -> str:
    """Every route, from the OpenAPI document that the server publishes at /openapi.json."""
    app = FastAPI(title="plexrank", version=__version__)
    for routes in (rank, events, explain, users, models):
        app.include_router(routes.router(MagicMock()))  # no server behind them: only their shapes are read
    for probed in (health, oip):
        app.include_router(probed.router(MagicMock(), MagicMock()))
    publish(app, secured=True)
    document = app.openapi()
    lines = ["# HTTP API\n", NOTE, "The server publishes this as `/openapi.json`, and as a page at `/docs`.\n"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += [
                f"## `{method.upper()} {path}`\n",
                f"{operation.get('description') or operation.get('summary', '')}\n",
            ]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            shape = document["components"]["schemas"].get(body.get("$ref", "").rpartition("/")[2], {})
            properties = shape.get("properties", {})
            required = shape.get("required", [])
            lines += _table(
                ["field", "type", "needed", "what it is"],
                (
                    [f"`{n}`", _type(p), "yes" if n in required else "no", p.get("description", "")]
                    for n, p in properties.items()
                ),
            )
            answers = operation["responses"]
            good = "; ".join(f"{code}: {answer['description']}" for code, answer in answers.items() if code < "400")
            lines.append(f"{good}. Errors: {', '.join(sorted(code for code in answers if code >= '400'))}.\n")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ shared
def _first(text: str | None) -> str:
    """The first paragraph, in one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def _table(columns: list[str], rows: Any) -> list[str]:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return []
    return [
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


PAGES: dict[str, Callable[[], str]] = {
    "plugins.md": plugins_page,
    "config.md": config_page,
    "errors.md": errors_page,
    "api.md": api_page,
}


def main() -> None:
    """Writes every page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page().rstrip() + "\n", "utf-8")
        print(FOLDER / name, file=sys.stderr)
    write_schemas(FOLDER / "schemas")


if __name__ == "__main__":
    main()
