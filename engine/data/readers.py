"""Parquet, CSV/TSV and Arrow files as a stream of record batches, whatever their size."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from engine.errors import DataError

BATCH_ROWS = 1 << 16
"""Rows a record batch has at most."""

Format = Literal["parquet", "csv", "tsv", "arrow"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


@dataclass(frozen=True)
class Table:
    """Files of one schema, read in order.

    text: columns that CSV files hold as text whatever they look like (ids: 007 is not 7).
    """

    files: tuple[Path, ...]
    format: str = "auto"
    text: frozenset[str] = frozenset()

    def schema(self) -> pa.Schema:
        """Column names and types of the first file."""
        with _explained(self.files[0]):
            kind = _kind(self.files[0], self.format)
            if kind == "parquet":
                return pq.read_schema(self.files[0])
            if kind == "arrow":
                with pa.memory_map(str(self.files[0])) as source:
                    return pa.ipc.open_file(source).schema
            with _open_csv(self.files[0], kind, self.text, None) as reader:
                return reader.schema

    def columns(self) -> list[str]:
        return list(self.schema().names)

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """Record batches of at most BATCH_ROWS rows with these columns, in the files' order."""
        wanted = list(columns)
        for path in self.files:
            with _explained(path):
                for batch in _batches(path, _kind(path, self.format), wanted, self.text):
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        yield batch.slice(start, BATCH_ROWS)

    def read(self, columns: Collection[str] | None = None) -> pa.Table:
        """All rows in memory: for items and users."""
        wanted = self.columns() if columns is None else list(columns)
        batches = list(self.batches(wanted))
        if not batches:
            return self.schema().empty_table().select(wanted)
        return pa.Table.from_batches(batches)


def _batches(path: Path, kind: str, columns: list[str], text: frozenset[str]) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        with pq.ParquetFile(path, memory_map=True) as file:
            _require(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                yield batch.select(columns)
    elif kind == "arrow":
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            _require(path, columns, reader.schema.names)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).select(columns)
    else:
        with _open_csv(path, kind, text, None) as reader:
            _require(path, columns, reader.schema.names)
        with _open_csv(path, kind, text, columns) as reader:
            yield from reader


def _open_csv(path: Path, kind: str, text: frozenset[str], columns: list[str] | None) -> csv.CSVStreamingReader:
    return csv.open_csv(
        pa.input_stream(str(path), compression="detect"),
        read_options=csv.ReadOptions(use_threads=False, block_size=4 << 20),
        parse_options=csv.ParseOptions(delimiter="\t" if kind == "tsv" else ","),
        convert_options=csv.ConvertOptions(
            include_columns=columns,
            column_types={name: pa.string() for name in text},
            strings_can_be_null=True,
        ),
    )


def _require(path: Path, columns: list[str], there: Sequence[str]) -> None:
    missing = [c for c in columns if c not in there]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(there)}")


def _kind(path: Path, given: str) -> str:
    if given != "auto":
        return given
    suffixes = [s for s in path.suffixes if s.lower() not in COMPRESSED]
    kind = SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    if kind is None:
        raise DataError(f"{path}: cannot tell the format from the name; set data.source.format")
    return kind


class _explained:
    """Arrow's and the system's errors as DataErrors that name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError) and not isinstance(error, DataError):
            raise DataError(f"{self.path}: cannot be read: {error}") from error


def find(pattern: str) -> list[Path]:
    """The files that a path or glob of the configuration names, sorted. A relative one lies under PLEXRANK_DATA if set.

    DataError where there are none.
    """
    path = Path(pattern).expanduser()
    base = os.environ.get("PLEXRANK_DATA")
    if not path.is_absolute() and base:
        path = Path(base).expanduser() / path
    found = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        where = f"PLEXRANK_DATA={base}" if base else f"PLEXRANK_DATA is not set, looked in {Path.cwd()}"
        raise DataError(f"no file matches '{pattern}' ({where})")
    return found
