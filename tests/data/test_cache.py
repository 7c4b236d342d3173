"""Prepared data is made once, and again when it is not whole or its sources changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine.data.prepare as module
from engine.config import Config
from engine.data.cache import default_cache
from engine.data.prepare import prepare
from engine.errors import DataError
from engine.plugins import Plugins

LOG = {"user": ["u", "v"], "item": ["a", "b"], "time": [1, 2], "label": [1, 0]}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each real preparation."""
    count: list[int] = []
    real = module._build

    def counted(*arguments: Any) -> None:
        count.append(1)
        real(*arguments)

    monkeypatch.setattr(module, "_build", counted)
    return count


@pytest.fixture
def config(tmp_path: Path) -> Config:
    pq.write_table(pa.table(LOG), tmp_path / "log.parquet")
    return make_config(tmp_path)


def make_config(folder: Path, dim: int = 8, **data: Any) -> Config:
    return Config.model_validate(
        {
            "name": "cached",
            "data": {
                "source": {"interactions": str(folder / "log.parquet")},
                "user": "user",
                "item": "item",
                "time": "time",
                "labels": {"click": {"column": "label"}},
                "split": {"by": "time", "validation": 0, "test": 0},
            }
            | data,
            "features": [{"name": "item", "dim": dim}],
        }
    )


def folders(cache: Path) -> list[Path]:
    return sorted(p for p in (cache / "prepared").iterdir() if p.is_dir())


def test_a_second_call_reads_the_cache_also_for_another_width(
    config: Config, plugins: Plugins, tmp_path: Path, builds: list[int]
) -> None:
    first = prepare(config, plugins, cache=tmp_path / "cache")
    second = prepare(make_config(tmp_path, dim=32), plugins, cache=tmp_path / "cache")
    assert len(builds) == 1
    assert first.rows == second.rows
    assert second.schema["item"].dim == 32


def test_changed_files_or_settings_are_prepared_again(
    config: Config, plugins: Plugins, tmp_path: Path, builds: list[int]
) -> None:
    prepare(config, plugins, cache=tmp_path / "cache")
    pq.write_table(pa.table(LOG | {"label": [0, 1]}), tmp_path / "log.parquet")
    os.utime(tmp_path / "log.parquet", ns=(1, 1))
    assert prepare(config, plugins, cache=tmp_path / "cache").arrays["labels"].ravel().tolist() == [0, 1]
    prepare(make_config(tmp_path, time=None), plugins, cache=tmp_path / "cache")
    assert len(builds) == 3


def _truncate(folder: Path) -> None:
    path = folder / "labels.bin"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = folder / "time.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))


def _half_written(folder: Path) -> None:
    (folder / "whole.json").unlink()


def _torn(folder: Path) -> None:
    (folder / "whole.json").write_text('{"labels.bin": [8')


def _lost(folder: Path) -> None:
    shutil.rmtree(folder / "catalogue")


@pytest.mark.parametrize("damage", [_truncate, _flip, _half_written, _torn, _lost])
def test_a_cache_that_is_not_whole_is_made_again(
    config: Config, plugins: Plugins, tmp_path: Path, builds: list[int], damage: Any
) -> None:
    prepare(config, plugins, cache=tmp_path / "cache")
    damage(folders(tmp_path / "cache")[0])
    again = prepare(config, plugins, cache=tmp_path / "cache")
    assert len(builds) == 2
    assert again.arrays["time"].tolist() == [1, 2]
    assert json.loads((again.folder / "whole.json").read_text())


def test_a_failed_preparation_leaves_nothing_behind(plugins: Plugins, tmp_path: Path) -> None:
    pq.write_table(pa.table(LOG | {"label": [1, 7]}), tmp_path / "log.parquet")
    with pytest.raises(DataError):
        prepare(make_config(tmp_path), plugins, cache=tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "prepared").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_cleared_away(config: Config, plugins: Plugins, tmp_path: Path) -> None:
    folder = prepare(config, plugins, cache=tmp_path / "cache").folder
    folder.rename(folder.with_name(f".{folder.name}-torn"))
    prepare(config, plugins, cache=tmp_path / "cache")
    assert folders(tmp_path / "cache") == [folder]


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLEXRANK_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("PLEXRANK_CACHE")
    assert default_cache() == Path.home() / ".cache" / "plexrank"


def test_unicode_ids_survive_the_cache(plugins: Plugins, tmp_path: Path) -> None:
    log = LOG | {"user": ["用户-1", "Zoë"], "item": ["Crème brûlée 🍮", "a\nb"]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    prepared = prepare(make_config(tmp_path), plugins, cache=tmp_path / "cache")
    assert [state.user for state in prepared.users()] == ["用户-1", "Zoë"]
    assert prepared.catalogue.rows(["a\nb", "Crème brûlée 🍮"]).tolist() == [1, 0]
