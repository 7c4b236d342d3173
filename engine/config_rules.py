"""What a configuration must fulfil beyond the types of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from engine.config import Config
from engine.document import Place
from engine.schema import FeatureSpec

INTEREST = "interest"
"""The field that the interest model fills (`engine.model`), beside those of the features."""

_ONLY = {
    "of": ("sequence",),
    "separator": ("multi",),
    "max_length": ("sequence", "multi"),
    "transform": ("numeric",),
    "bins": ("numeric",),
}
"""Keys of a feature that mean something for these kinds alone."""


def broken_rules(config: Config) -> list[tuple[Place, str]]:
    """(place, message) of every rule that the configuration breaks; empty where all is well."""
    return [*_data(config), *_features(config), *_sequences(config), *_spaces(config), *_parts(config), *_join(config)]


def _data(config: Config) -> Iterator[tuple[Place, str]]:
    data, split = config.data, config.data.split
    if data.dataset is None and data.source is None:
        yield ("data",), "names neither 'dataset' (a plugin that brings data) nor 'source' (files of your own)"
    if data.dataset is not None and data.source is not None:
        yield ("data", "source"), "stands beside 'dataset'; keep one of them"
    if split.validation + split.test >= 1:
        yield ("data", "split"), f"validation {split.validation:g} and test {split.test:g} leave nothing to train on"
    if split.by in ("time", "user_tail") and data.time is None:
        yield ("data", "split", "by"), f"'{split.by}' needs data.time, the column with the time; or split by hash"
    if split.by == "user_tail" and data.user is None:
        yield ("data", "split", "by"), "'user_tail' needs data.user, the column that names the user; or split by time"
    if split.by == "hash" and (split.key or data.user) is None:
        yield ("data", "split"), "split by hash needs 'key', the column whose values stay together, or data.user"
    if split.by == "column" and split.column is None:
        yield ("data", "split"), "split by column needs 'column', which holds train, validation or test"


def _features(config: Config) -> Iterator[tuple[Place, str]]:
    for index, feature in enumerate(config.features):
        for name, kinds in _ONLY.items():
            if name in feature.model_fields_set and feature.kind not in kinds:
                what = " or ".join(kinds)
                yield (
                    ("features", index, name),
                    f"only a feature of kind {what} has it; '{feature.name}' is {feature.kind}",
                )
        if feature.kind == "numeric" and "bins" in feature.model_fields_set and feature.transform != "bins":
            yield ("features", index, "bins"), f"needs 'transform: bins'; the transform is {feature.transform}"
        if feature.name == INTEREST and config.interest is not None:
            yield ("features", index, "name"), f"'{INTEREST}' is what the interest model fills; choose another name"
        if feature.is_dense and feature.dim is not None:
            yield ("features", index, "dim"), "a number has no embedding; remove it, or set 'transform: bins'"


def _sequences(config: Config) -> Iterator[tuple[Place, str]]:
    by_name = {f.name: f for f in config.features}
    first = next((f for f in config.features if f.kind == "sequence"), None)
    for index, feature in enumerate(config.features):
        if feature.kind != "sequence" or first is None:
            continue
        if feature.max_length != first.max_length:
            yield (
                ("features", index, "max_length"),
                f"{feature.max_length} differs from {first.max_length} of '{first.name}'; all list the same events",
            )
        if not feature.of:
            yield ("features", index), f"sequence '{feature.name}' needs 'of': the feature whose past values it lists"
        elif feature.of not in by_name:
            close = get_close_matches(feature.of, [n for n, f in by_name.items() if f.kind == "categorical"], n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f" (features: {', '.join(by_name)})"
            yield ("features", index, "of"), f"no feature named '{feature.of}'{hint}"
        else:
            yield from _wrong_target(index, feature, by_name[feature.of])


def _wrong_target(index: int, feature: FeatureSpec, target: FeatureSpec) -> Iterator[tuple[Place, str]]:
    if target.kind != "categorical":
        yield ("features", index, "of"), f"'{target.name}' is {target.kind}; a sequence lists a categorical feature"
    elif target.side != "item":
        yield (
            ("features", index, "of"),
            f"'{target.name}' is of the {target.side}; a sequence lists a feature of the item",
        )
    elif feature.space != target.space:
        yield (
            ("features", index, "space"),
            f"'{feature.space}' differs from '{target.space}', the space of '{target.name}'; leave it out",
        )


def _spaces(config: Config) -> Iterator[tuple[Place, str]]:
    """Features of one space are rows of one table: one width, one number of lookups."""
    for name in ("dim", "lookups"):
        first: dict[str, FeatureSpec] = {}
        for index, feature in enumerate(config.features):
            value = getattr(feature, name)
            if value is None or feature.is_dense:
                continue
            other = first.setdefault(feature.space, feature)
            if getattr(other, name) != value:
                yield (
                    ("features", index, name),
                    f"{value} differs from {getattr(other, name)} of '{other.name}', also of space '{feature.space}'",
                )


def _parts(config: Config) -> Iterator[tuple[Place, str]]:
    sequences = [f for f in config.features if f.kind == "sequence"]
    if config.interest is not None and not sequences:
        yield ("interest",), "needs a feature of kind sequence (a history to read); add one, or set interest to null"
    if config.retrieval is not None:
        if config.data.item is None:
            yield ("retrieval",), "needs data.item, the column that names the item"
        if config.data.user is None:
            yield ("retrieval",), "needs data.user, the column that names the user"


def _join(config: Config) -> Iterator[tuple[Place, str]]:
    """What is said of a task that the model does not have would be lost without a word."""
    join, tasks = config.learning.join, list(config.data.labels)
    windows = join.window_seconds if isinstance(join.window_seconds, dict) else {}
    for key, given in (("labels", join.labels), ("window_seconds", windows), ("feedback", join.feedback)):
        for task in given:
            if task not in tasks:
                close = get_close_matches(task, tasks, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else f" (data.labels: {', '.join(tasks) or 'none'})"
                yield ("learning", "join", key, task), f"no task named '{task}'{hint}"
