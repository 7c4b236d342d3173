"""Which column of which table feeds each feature, settled before a row is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from engine.components import DatasetFiles
from engine.config import Config
from engine.data.readers import Table, find
from engine.errors import DataError, SchemaError
from engine.plugins import Plugins
from engine.schema import FeatureSpec, Schema


@dataclass(frozen=True)
class Plan:
    """Where each feature comes from.

    by_row: from the interactions. by_item, by_user: from the attributes of the row's item or user. from_log: sequences
    built from the user's earlier positives. given: sequences that stand in a column (also in by_row).
    """

    config: Config
    schema: Schema
    interactions: Table
    items: Table | None
    users: Table | None
    by_row: list[FeatureSpec] = field(default_factory=list)
    by_item: list[FeatureSpec] = field(default_factory=list)
    by_user: list[FeatureSpec] = field(default_factory=list)
    from_log: list[FeatureSpec] = field(default_factory=list)

    def place(self, feature: FeatureSpec) -> str:
        """`row`, `item`, `user` or `log`."""
        for place in ("row", "item", "user"):
            if feature in getattr(self, f"by_{place}"):
                return place
        return "log"

    @property
    def row_ids(self) -> list[FeatureSpec]:
        """Features with exactly one id a row, bins too: columns of the array `ids`."""
        return [f for f in self.by_row if not f.is_jagged and not f.is_dense]

    @property
    def row_numbers(self) -> list[FeatureSpec]:
        """Dense features by row: columns of the array `dense`."""
        return [f for f in self.by_row if f.is_dense]

    @property
    def row_lists(self) -> list[FeatureSpec]:
        return [f for f in self.by_row if f.is_jagged]

    def columns(self) -> list[str]:
        """What has to be read of the interactions."""
        data = self.config.data
        names = [data.user, data.item, data.time, *(label.column for label in data.labels.values())]
        names += [data.split.column if data.split.by == "column" else None]
        names += [split_key(self.config) if data.split.by == "hash" else None]
        names += [f.column for f in self.by_row]
        return list(dict.fromkeys(n for n in names if n is not None))


def split_key(config: Config) -> str | None:
    """The column whose values stay together in a split by hash."""
    return config.data.split.key or config.data.user or config.data.item


def locate(config: Config, plugins: Plugins, cache: Path) -> DatasetFiles:
    """The files of the dataset plugin or of `data.source`."""
    data = config.data
    if (data.dataset is None) == (data.source is None):
        raise SchemaError("data needs either `dataset` or `source`")
    if data.dataset is not None:
        cls = plugins.get("datasets", data.dataset.name)
        dataset = cls(cls.Options(**data.dataset.options))
        folder = cache / "datasets" / data.dataset.name
        folder.mkdir(parents=True, exist_ok=True)
        files: DatasetFiles = dataset.prepare(folder)
        return files
    assert data.source is not None
    return DatasetFiles(
        _found("interactions", data.source.interactions),
        _found("items", data.source.items)[0] if data.source.items else None,
        _found("users", data.source.users)[0] if data.source.users else None,
    )


def _found(key: str, pattern: str) -> list[Path]:
    try:
        return find(pattern)
    except DataError as error:
        raise DataError(f"data.source.{key}: {error}") from None


def make_plan(config: Config, files: DatasetFiles) -> Plan:
    """Reads the tables' headers. SchemaError where a feature has no column or cannot be built."""
    schema = config.schema_()
    data = config.data
    given = data.source.format if data.source else "auto"
    ids = {f.column for f in schema.features if f.kind != "numeric"}
    ids |= {c for c in (data.user, data.item, data.split.column, data.split.key) if c}
    interactions = _table(files.interactions, given, ids)
    items = _table([files.items], "auto", ids) if files.items else None
    users = _table([files.users], "auto", ids) if files.users else None
    plan = Plan(config, schema, interactions, items, users)
    log, of_item, of_user = (t.columns() if t else [] for t in (interactions, items, users))
    for what, column in _roles(config):
        if column not in log:
            raise SchemaError(f"{what}: the interactions have no column '{column}'{_near(column, log)}")
    for table, key, name in ((of_item, data.item, "items"), (of_user, data.user, "users")):
        if table and key not in table:
            raise SchemaError(f"the table of {name} has no column '{key}'; it has {', '.join(table)}")
    for number, feature in enumerate(schema.features):
        plan_of = _place(feature, data.item, data.user, log, of_item, of_user)
        if plan_of is None and feature.kind == "sequence" and feature.of:
            plan_of = "log"
        if plan_of is None:
            everything = list(dict.fromkeys([*log, *of_item, *of_user]))
            raise SchemaError(
                f"features[{number}].column: no column '{feature.column}' feeds '{feature.name}'"
                f"{_near(feature.column, everything)}"
            )
        {"row": plan.by_row, "item": plan.by_item, "user": plan.by_user, "log": plan.from_log}[plan_of].append(feature)
    _check_sequences(plan)
    return plan


def _table(files: list[Path], given: str, text: set[str]) -> Table:
    table = Table(tuple(files), given)
    return Table(table.files, given, frozenset(text & set(table.columns())))


def _roles(config: Config) -> list[tuple[str, str]]:
    data = config.data
    roles = [("data.user", data.user), ("data.item", data.item), ("data.time", data.time)]
    roles += [(f"data.labels.{task}.column", label.column) for task, label in data.labels.items()]
    if data.split.by == "column":
        if not data.split.column:
            raise SchemaError("data.split.by is column, but data.split.column names none")
        roles.append(("data.split.column", data.split.column))
    if data.split.by == "hash":
        if split_key(config) is None:
            raise SchemaError("data.split.by is hash, but data.split.key names no column and there is no user")
        roles.append(("data.split.key", split_key(config)))
    if data.split.by == "user_tail" and data.user is None:
        raise SchemaError("data.split.by is user_tail, but data.user is null")
    return [(what, column) for what, column in roles if column is not None]


def _place(
    feature: FeatureSpec, item: str | None, user: str | None, log: list[str], of_item: list[str], of_user: list[str]
) -> str | None:
    if feature.kind == "categorical" and feature.side == "item" and feature.column == item:
        return "item"
    if feature.kind == "categorical" and feature.side == "user" and feature.column == user:
        return "user"
    if feature.column in log:
        return "row"
    if feature.side == "item" and feature.column in of_item:
        return "item"
    if feature.side == "user" and feature.column in of_user and feature.kind != "sequence":
        return "user"
    return None


def _check_sequences(plan: Plan) -> None:
    schema = plan.schema
    sequences = schema.sequences
    if len({f.max_length for f in sequences}) > 1:
        raise SchemaError("features: sequences list the same events and need one max_length")
    if plan.from_log and len(plan.from_log) < len(sequences):
        given = [f.name for f in sequences if f not in plan.from_log]
        raise SchemaError(f"features: {', '.join(given)} stand in a column, other sequences do not: give all or none")
    if plan.from_log and schema.user is None:
        raise SchemaError(f"sequence '{plan.from_log[0].name}': a history needs data.user")
    names = [f.name for f in schema.features]
    for sequence in plan.from_log:
        if sequence.of not in names:
            raise SchemaError(f"features.{sequence.name}.of: no feature '{sequence.of}'{_near(sequence.of, names)}")
        target = schema[sequence.of]
        if target.is_jagged or target.is_dense or target.side == "user":
            raise SchemaError(f"features.{sequence.name}.of: '{target.name}' is not one id of an item or context")


def _near(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
