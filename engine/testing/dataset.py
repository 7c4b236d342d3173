"""The contract of datasets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from engine.components import Dataset, DatasetFiles
from engine.testing.contract import Contract, Options


def check_dataset(cls: type[Dataset], options: Options = None, *, cache: Path | None = None) -> None:
    """Parquet files with rows, inside the cache, made once.

    cache: a folder to keep, by default a temporary one.
    """
    contract = Contract("datasets", cls, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = cache or Path(temporary)
        first = _prepare(contract, folder)
        made = {path: path.stat().st_mtime_ns for path in _files(contract, first)}
        second = _prepare(contract, folder)
        contract.holds(first == second, "must name the same files when it is asked again")
        contract.holds(
            all(path.stat().st_mtime_ns == when for path, when in made.items()),
            "must not write its files again when they are there",
        )


def _prepare(contract: Contract, folder: Path) -> DatasetFiles:
    with contract.when("in prepare"):
        files = contract.cls(contract.options).prepare(folder)
    contract.holds(isinstance(files, DatasetFiles), "must give DatasetFiles")
    return files


def _files(contract: Contract, files: DatasetFiles) -> list[Path]:
    contract.holds(files.interactions, "must name at least one file of interactions")
    every = [*files.interactions, *(f for f in (files.items, files.users) if f is not None)]
    for path in every:
        contract.holds(path.is_file(), f"must have made {path.name}")
        with contract.when(f"as {path.name} was read as Parquet"):
            rows = pq.read_metadata(path).num_rows
        contract.holds(rows > 0, f"must put rows into {path.name}")
    return every
