"""What brings data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from engine.components.base import Component, PluginOptions


@dataclass
class DatasetFiles:
    """Where a dataset lies: interactions (in any order), and the items' and users' attributes if there are any.

    Items have the schema's item column (and may have `title`), users the user column.
    """

    interactions: list[Path]
    items: Path | None = None
    users: Path | None = None


class Dataset(Component, ABC):
    """Brings a dataset to Parquet files on this machine."""

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @abstractmethod
    def prepare(self, cache: Path) -> DatasetFiles:
        """Fetches or converts once into `cache`; a second call is quick. DataError says where the data comes from."""
