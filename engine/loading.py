"""From a YAML file to a `Config`, or to every mistake in it at once: `file:line: key: what is wrong; what to do`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from engine.config import Config, components
from engine.config_rules import broken_rules
from engine.document import Document, Place, key, parse_document, place_of, read_document
from engine.errors import ConfigError, PlexrankError, PluginError
from engine.plugins import Plugins, installed


def load_config(path: Path, overrides: Mapping[str, Any] | None = None, plugins: Plugins | None = None) -> Config:
    """Reads and checks a configuration.

    overrides: dotted key -> value, as in `{"training.epochs": 2, "interest.name": "mean"}`; text is read as YAML.
        A plugin given another name loses the options of the one before.
    plugins: what the names may mean; by default what is installed.
    Raises ConfigError; the message has one line a mistake.
    """
    document = read_document(Path(path))
    for dotted, value in (overrides or {}).items():
        override(document, dotted, value)
    return check(document, installed() if plugins is None else plugins)


def with_overrides(config: Config, overrides: Mapping[str, Any], plugins: Plugins | None = None) -> Config:
    """The configuration with some values changed, checked again; keys and values as for `load_config`."""
    document = Document(config.name, config.model_dump(mode="json", exclude_unset=True))
    for dotted, value in overrides.items():
        override(document, dotted, value)
    return check(document, installed() if plugins is None else plugins)


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Errors raised inside that begin with a key of the file, as `features[3].column: ...`, get its `file:line:`."""
    try:
        yield
    except PlexrankError as error:
        message = read_document(Path(path)).locate(str(error))
        if message == str(error):
            raise
        raise ConfigError(message) from error


def check(document: Document, plugins: Plugins) -> Config:
    """The configuration that a document holds; ConfigError with all its mistakes."""
    mistakes = _options(document, plugins)
    try:
        config = Config.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        mistakes += [(_place(e["loc"]), describe(dict(e), Config)) for e in error.errors()]
    else:
        mistakes += broken_rules(config)
        if not mistakes:
            return config
    mistakes.sort(key=lambda m: document.line(m[0]) or 0)
    raise ConfigError("\n".join(f"{document.where(place)}: {what}" for place, what in mistakes))


def _place(loc: Sequence[str | int]) -> Place:
    """pydantic's place, where a wrong key of a mapping counts as the key itself."""
    return tuple(part for part in loc if part != "[key]")


def override(document: Document, dotted: str, value: Any) -> None:
    """Sets one value as the command line asks; sections on the way are made, list entries must exist."""
    place = place_of(dotted)
    if isinstance(value, str):
        value = _yaml_value(dotted, value)
    if not place:
        raise ConfigError("--set: a value needs a key, as in training.epochs=3")
    here = document.data
    for depth, part in enumerate(place[:-1]):
        here = _step(here, part, place[: depth + 1])
    last = place[-1]
    if isinstance(here, list):
        if not isinstance(last, int) or last >= len(here):
            raise ConfigError(f"--set: {dotted}: {key(place[:-1])} has {len(here)} entries, counted from 0")
        here[last] = value
    else:
        if last == "name" and any(p == place[:-1] for p, _, _ in components(document.data)) and here.get(last) != value:
            here.pop("options", None)
        here[str(last)] = value
    for old in [p for p in document.lines if p[: len(place)] == place]:
        del document.lines[old]
    document.lines[place] = 0


def _step(here: Any, part: str | int, place: Place) -> Any:
    if isinstance(here, list):
        if not isinstance(part, int) or part >= len(here):
            raise ConfigError(f"--set: {key(place)}: the list has {len(here)} entries, counted from 0")
        inner = here[part]
    else:
        if here.get(str(part)) is None:
            here[str(part)] = {}
        inner = here[str(part)]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--set: {key(place)} is {inner!r}, which has no keys")
    return inner


def _yaml_value(dotted: str, text: str) -> Any:
    try:
        return parse_document(f"value: {text}", "--set").data["value"]
    except ConfigError:
        raise ConfigError(f"--set: {dotted}: '{text}' is not a YAML value") from None


def _options(document: Document, plugins: Plugins) -> list[tuple[Place, str]]:
    """Mistakes in the plugins' names and options."""
    mistakes: list[tuple[Place, str]] = []
    for place, kind, value in components(document.data):
        if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
            continue  # the structure is wrong: pydantic says so
        try:
            found = plugins.get(kind, value["name"])
        except PluginError as error:
            mistakes.append(((*place, "name"), str(error)))
            continue
        if kind == "losses" and (trained := "encoder" if place[0] == "retrieval" else "ranker") not in found.trains:
            meant = " and ".join(f"{t}s" for t in sorted(found.trains))
            mistakes.append(
                ((*place, "name"), f"'{value['name']}' is a loss of {meant}; {place[0]} trains {trained}s here")
            )
        model, options = found.Options, value.get("options") or {}
        try:
            if isinstance(options, dict):
                model.model_validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            mistakes += [((*place, "options", *e["loc"]), describe(dict(e), model)) for e in error.errors()]
    named = document.data.get("plugins")
    for index, name in enumerate(named if isinstance(named, list) else []):
        try:
            if isinstance(name, str):
                plugins.moment(name)
        except PluginError as error:
            mistakes.append((("plugins", index), str(error)))
    return mistakes


# --------------------------------------------------------------------------------------- messages of pydantic


def describe(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error in our words."""
    loc, kind, context = tuple(error["loc"]), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(model, loc[:-1])
        return f"unknown key{near(str(loc[-1]), known)} (known: {', '.join(known) or 'none'})"
    if kind == "missing":
        return "missing, and it has no default"
    if kind in ("literal_error", "enum"):
        allowed = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{_shown(error['input'])} is not one of {', '.join(allowed)}{near(str(error['input']), allowed)}"
    if kind == "string_pattern_mismatch":
        return f"{_shown(error['input'])} does not match {context['pattern']}"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    return f"{_shown(error['input'])}: {error['msg'].replace('Input should', 'should')}"


def near(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'item_id'?`, or nothing."""
    close = get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields_at(model: type[BaseModel], loc: Place) -> list[str]:
    """The keys that a model allows at a place below it."""
    annotation: Any = model
    for part in loc:
        annotation = _below(annotation, part)
    found = _model_in(annotation)
    return list(found.model_fields) if found else []


def _below(annotation: Any, part: str | int) -> Any:
    model = _model_in(annotation)
    if model is not None:
        field = model.model_fields.get(str(part))
        return field.annotation if field else None
    for leaf in _leaves(annotation):
        if get_origin(leaf) in (list, tuple, dict):
            return get_args(leaf)[-1 if get_origin(leaf) is dict else 0]
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    return next((a for a in _leaves(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _leaves(annotation: Any) -> list[Any]:
    """`X | None`, `Annotated[X, ...]` -> the plain types inside."""
    if get_origin(annotation) is Annotated:
        return _leaves(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [leaf for arg in get_args(annotation) for leaf in _leaves(arg)]
    return [annotation]
