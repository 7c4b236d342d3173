"""The shop's data and one model of it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.prepare import Prepared
from engine.plugins import Plugins
from tests.inference.rich_world import Snapshot, config_of, prepared_shop, snapshot


@pytest.fixture(scope="session")
def shop_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shop")


@pytest.fixture(scope="session")
def shop(shop_folder: Path, plugins: Plugins) -> Prepared:
    return prepared_shop(shop_folder, plugins)


@pytest.fixture(scope="session")
def ranked(shop_folder: Path, shop: Prepared, plugins: Plugins) -> Snapshot:
    """DIN over full tables, items' vectors ahead."""
    return snapshot(config_of(shop_folder), shop, plugins)
