"""A YAML file as plain data that remembers the line of every key, and refuses what a configuration never needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

Place = tuple[str | int, ...]
"""Where a value stands: `("features", 3, "of")`."""

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 50_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads scalars as YAML 1.2 does: `1e-3` is a number, `no`, `on` and dates are text."""


_OLD = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLD]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """What a file says, and the line that says it."""

    path: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def line(self, place: Place) -> int | None:
        """The line of a value, or of the nearest thing around it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return None

    def where(self, place: Place) -> str:
        """`file:line: key`, or `--set: key` for what the command line said."""
        line = self.line(place)
        at = f"{self.path}:{line}" if line else "--set"
        return f"{at}: {key(place)}" if place else at

    def locate(self, message: str) -> str:
        """Puts `file:line:` before a message that begins with a key of this file, as in `features[3].column: ...`."""
        found = re.match(r"([a-z_]+(?:\[\d+\]|\.[A-Za-z_][\w-]*)*): ", message)
        place = place_of(found[1]) if found else ()
        return f"{self.where(place)}{message[found.end(1) :]}" if found and place[:1] in self.lines else message


def key(place: Place) -> str:
    """`("features", 3, "of")` -> `features[3].of`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def place_of(dotted: str) -> Place:
    """`features[3].of` and `features.3.of` -> `("features", 3, "of")`."""
    parts = re.findall(r"[^.\[\]]+", dotted)
    return tuple(int(part) if part.isdigit() else part for part in parts)


def read_document(path: Path) -> Document:
    """Reads a configuration file. ConfigError for what is no YAML, no mapping, too large, or says a key twice."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes; a configuration has at most {MAX_BYTES:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_near_file(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """The same for text that is at hand; `name` stands for the file in messages."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested more than {MAX_DEPTH} levels deep") from None
    if not isinstance(root, yaml.MappingNode):
        line = f":{root.start_mark.line + 1}" if root else ""
        raise ConfigError(f"{name}{line}: a configuration is a mapping of keys, such as `name: my-model`")
    reader = _Reader(name)
    data = reader.read(root, ())
    if reader.errors:
        raise ConfigError("\n".join(reader.errors))
    return Document(name, data, reader.lines)


class _Reader:
    """Walks composed nodes; aliases are walked again at each use, so that what they expand to counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Place, int] = {}
        self.errors: list[str] = []
        self._values = 0
        self._scalars = _Loader("")

    def read(self, node: yaml.Node, place: Place) -> Any:
        self._values += 1
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        if self._values > MAX_VALUES:
            raise ConfigError(f"{self.name}:{line}: more than {MAX_VALUES:,} values, aliases expanded")
        if len(place) > MAX_DEPTH:
            raise ConfigError(f"{self.name}:{line}: nested more than {MAX_DEPTH} levels deep")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            self.errors.append(f"{self.name}:{line}: {key(place)}: no tag but YAML's own is read, not '{node.tag}'")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*place, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in self._pairs(node, place):
            line = key_node.start_mark.line + 1
            name = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                self.errors.append(f"{self.name}:{line}: {key((*place, name))}: a key is text; put it in quotes")
            elif name in first:
                where = f"{self.name}:{line}: {key((*place, name))}"
                self.errors.append(f"{where}: said twice; the first is in line {first[name]}")
            else:
                first[name] = line
                self.lines[(*place, name)] = line
                result[name] = self.read(value_node, (*place, name))
        return {**self._merged(node, place, set(first)), **result}

    def _pairs(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                line = key_node.start_mark.line + 1
                self.errors.append(f"{self.name}:{line}: {key(place) or 'key'}: a key is text, not a list or mapping")
            elif key_node.tag != "tag:yaml.org,2002:merge":
                yield key_node, value_node

    def _merged(self, node: yaml.MappingNode, place: Place, taken: set[str]) -> dict[str, Any]:
        """What `<<:` brings: mappings whose keys give way to those said here."""
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    merged = self.read(source, (*place, "<<"))
                    if isinstance(merged, dict):
                        result = {**merged, **result}
        return {name: value for name, value in result.items() if name not in taken}

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        try:
            return self._scalars.construct_object(node)
        except yaml.MarkedYAMLError as error:
            self.errors.append(f"{self.name}:{node.start_mark.line + 1}: {key(place)}: {error.problem}")
        except ValueError as error:
            self.errors.append(f"{self.name}:{node.start_mark.line + 1}: {key(place)}: {error}")
        return None


def _near_file(path: Path) -> str:
    from difflib import get_close_matches

    folder = path.parent
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean '{folder / near[0]}'?" if near else ""
