"""Small logs written by hand, prepared in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import Config
from engine.data.prepare import Prepared, prepare
from engine.plugins import Plugins

World = Callable[..., Prepared]


def write(folder: Path, **tables: dict[str, list[Any]]) -> dict[str, str]:
    """Parquet files; -> the `data.source` section."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in tables}


def configure(source: dict[str, str], features: list[dict[str, Any]], **data: Any) -> Config:
    """A configuration over these files; `data` replaces entries of its data section."""
    section: dict[str, Any] = {
        "source": source,
        "user": "user",
        "item": "item",
        "time": "time",
        "labels": {"click": {"column": "label"}},
        "split": {"by": "time", "validation": 0, "test": 0},
    }
    return Config.model_validate({"name": "world", "data": section | data, "features": features})


@pytest.fixture
def world(tmp_path: Path, plugins: Plugins) -> World:
    """Prepares a log given as columns, with items and users if given."""

    def make(
        log: dict[str, list[Any]],
        features: list[dict[str, Any]],
        *,
        items: dict[str, list[Any]] | None = None,
        users: dict[str, list[Any]] | None = None,
        **data: Any,
    ) -> Prepared:
        tables = {"interactions": log} | ({"items": items} if items else {}) | ({"users": users} if users else {})
        config = configure(write(tmp_path / "files", **tables), features, **data)
        return prepare(config, plugins, cache=tmp_path / "cache")

    return make
