"""Criteo's display advertising challenge, from files that one brings."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
from pydantic import Field

from engine.components import Dataset, DatasetFiles, PluginOptions
from engine.errors import DataError
from engine.hookspecs import hookimpl
from plugins.datasets.files import bring, folder_for, whole, write_batches

COMES_FROM = (
    "it comes from Criteo's Kaggle display advertising challenge (train.txt, tab-separated, may be .gz or .xz): set "
    "data.dataset.options.path to the file, absolute or under PLEXRANK_DATA"
)
NUMBERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
CHUNKS = 4


class Criteo(Dataset):
    """Display-ad impressions in the order of time: 13 counts, 26 categories, clicked or not.

    interactions: label, I1..I13, C1..C26, chunk (1..4, quarters in the order of time), split. Chunks 1 to 3 are for
    training, of which the last `validation` part is for validation; chunk 4 is the test.
    """

    name = "criteo"

    class Options(PluginOptions):
        path: str = Field(
            "criteo-80k/criteo80k.parquet", description="train.txt (tab-separated), .gz, .xz, or Parquet of its columns"
        )
        rows: int | None = Field(None, ge=4, description="only the first rows")
        validation: float = Field(0.1, ge=0, lt=1, description="share of chunks 1-3 kept for validation, the newest")

    options: Options

    def prepare(self, cache: Path) -> DatasetFiles:
        """Converts to Parquet, streaming; missing values become nulls."""
        source = bring(self.options.path, COMES_FROM)
        out = DatasetFiles([folder_for(cache, [source], self.options.model_dump_json()) / "impressions.parquet"])
        if whole(out):
            return out
        try:
            total = min(_count(source), self.options.rows or 1 << 62)
            batches = self._batches(source, total)
            first = next(batches, None)
            if first is None:
                raise DataError(f"{source}: no rows; {COMES_FROM}")
            write_batches(first.schema, chain([first], batches), out.interactions[0])
        except (OSError, EOFError, lzma.LZMAError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{source}: cannot be read as Criteo's rows ({error}); {COMES_FROM}") from error
        return out

    def _batches(self, source: Path, total: int) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in _read(source):
            batch = batch.slice(0, total - start)
            if not batch.num_rows:
                return
            yield self._shape(batch, start, total)
            start += batch.num_rows

    def _shape(self, batch: pa.RecordBatch, start: int, total: int) -> pa.RecordBatch:
        place = np.arange(start, start + batch.num_rows)
        chunk = place * CHUNKS // total + 1
        train = total * (CHUNKS - 1) // CHUNKS
        edges = [round(train * (1 - self.options.validation)), train]
        split = pa.array(np.array(["train", "validation", "test"])[np.searchsorted(edges, place, side="right")])
        columns = {"label": batch.column("label").cast(pa.int8()), "chunk": pa.array(chunk, pa.int8()), "split": split}
        columns |= {name: batch.column(name).cast(pa.float32()) for name in NUMBERS}
        return pa.RecordBatch.from_pydict(columns | {name: _category(batch.column(name)) for name in CATEGORIES})


def _category(column: pa.Array) -> pa.Array:
    """Text; -1 stands for a missing value in files whose categories are hashed to integers."""
    if pa.types.is_integer(column.type):
        column = pc.if_else(pc.less(column, 0), pa.scalar(None, column.type), column)
    return column.cast(pa.string())


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    return sum(batch.num_rows for batch in _read(path))


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=["label", *NUMBERS, *CATEGORIES], use_threads=False)
        return
    types = {"label": pa.int8()} | dict.fromkeys(NUMBERS, pa.float64()) | dict.fromkeys(CATEGORIES, pa.string())
    with ExitStack() as stack:
        if path.suffix == ".xz":
            source = pa.PythonFile(stack.enter_context(lzma.open(path)), mode="r")
        else:
            source = pa.input_stream(str(path), compression="detect")
        reader = csv.open_csv(
            source,
            read_options=csv.ReadOptions(column_names=list(types), use_threads=False),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=True),
        )
        yield from stack.enter_context(reader)


@hookimpl
def datasets() -> list[type[Dataset]]:
    return [Criteo]
