"""What dataset plugins share: finding files that people brought, and writing Parquet whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.components import DatasetFiles
from engine.errors import DataError


def bring(path: str, comes_from: str) -> Path:
    """A path as it is, or under PLEXRANK_DATA if relative. DataError says where the data comes from."""
    given = Path(path).expanduser()
    base = os.environ.get("PLEXRANK_DATA")
    found = Path(base).expanduser() / given if base and not given.is_absolute() else given
    if not found.exists():
        hint = "" if base or given.is_absolute() else " (relative paths lie under PLEXRANK_DATA, which is not set)"
        raise DataError(f"{found} does not exist{hint}; {comes_from}")
    return found


def folder_for(cache: Path, sources: list[Path], options: str) -> Path:
    """A folder in the cache for what these files and options give; other files or options have another."""
    told = [options, *(f"{p.resolve()}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in sources)]
    folder = cache / hashlib.sha256("|".join(told).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def whole(files: DatasetFiles) -> bool:
    """Whether all the files are there; each was written aside and renamed, the interactions last."""
    return all(p.exists() for p in (*files.interactions, files.items, files.users) if p is not None)


def write_table(table: pa.Table, path: Path) -> None:
    write_batches(table.schema, iter(table.to_batches()), path)


def write_batches(schema: pa.Schema, batches: Iterator[pa.RecordBatch], path: Path) -> None:
    """Parquet with row groups of 256 Ki rows, written aside and renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=1 << 18)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
