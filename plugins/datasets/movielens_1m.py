"""MovieLens-1M from files that one brings: its licence lets nobody pass the ratings on."""

from __future__ import annotations

import gzip
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
from plugins.datasets.files import bring, folder_for, whole, write_table

COMES_FROM = (
    "it comes from grouplens.org/datasets/movielens/1m: unpack ml-1m.zip and set PLEXRANK_DATA to the folder that "
    "holds ml-1m, or data.dataset.options.path to ratings.dat"
)
RATINGS = ("ratings.dat", "ratings.dat.gz", "ratings.users1-2999.dat.gz")
MERGED = ["user_id", "movie_id", "rating", "timestamp"]
AGES = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}
JOBS = (
    "other", "educator", "artist", "clerical", "student", "customer service", "doctor", "executive", "farmer",
    "homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales", "scientist", "self-employed",
    "engineer", "craftsman", "unemployed", "writer",
)  # fmt: skip


class MovieLens1M(Dataset):
    """A million ratings (1-5) of 6,040 users and some 3,900 films, from files that one brings.

    interactions: user_id, item_id, rating, timestamp.
    items: item_id, title, year, genres (separated by |). users: user_id, gender, age, occupation, zip.
    """

    name = "movielens-1m"

    class Options(PluginOptions):
        path: str = Field(
            "ml-1m",
            description="folder of ratings.dat, users.dat, movies.dat, or the ratings as .dat[.gz] or .parquet",
        )
        max_user: int | None = Field(None, ge=1, description="only users up to this number")

    options: Options

    def prepare(self, cache: Path) -> DatasetFiles:
        """Converts to Parquet; users.dat and movies.dat are left out where they are not beside the ratings."""
        ratings = self._ratings()
        folder = folder_for(cache, [ratings], self.options.model_dump_json())
        users, films = ratings.parent / "users.dat", ratings.parent / "movies.dat"
        out = DatasetFiles(
            [folder / "ratings.parquet"],
            folder / "films.parquet" if films.exists() else None,
            folder / "users.parquet" if users.exists() else None,
        )
        if whole(out):
            return out
        if out.items:
            write_table(_films(films), out.items)
        if out.users:
            write_table(_users(users), out.users)
        write_table(self._interactions(ratings), out.interactions[0])
        return out

    def _ratings(self) -> Path:
        found = bring(self.options.path, COMES_FROM)
        if found.is_file():
            return found
        for name in RATINGS:
            if (found / name).exists():
                return found / name
        raise DataError(f"{found} holds none of {', '.join(RATINGS)}; {COMES_FROM}")

    def _interactions(self, path: Path) -> pa.Table:
        if path.suffix == ".parquet":
            table = _merged(path)
        else:
            table = _dat(path, ["user_id", "item_id", "rating", "timestamp"], pa.int64())
        if self.options.max_user is not None:
            table = table.filter(pc.less_equal(table["user_id"], self.options.max_user))
        return table


def _merged(path: Path) -> pa.Table:
    """One Parquet file of all pairs; unknown ratings and times are 0, rows of status 2 (label unknown) are left out."""
    try:
        table = pq.read_table(path)
        if "status" in table.column_names:
            table = table.filter(pc.less(table["status"], 2))
        return table.select(MERGED).rename_columns(["user_id", "item_id", "rating", "timestamp"])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as MovieLens-1M ({error}); {COMES_FROM}") from error


def _dat(path: Path, names: list[str], kind: pa.DataType) -> pa.Table:
    """Fields between double colons, latin-1; DataError if they do not fit."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("latin-1").replace("::", "\x1f").encode()
        return csv.read_csv(
            pa.BufferReader(text),
            read_options=csv.ReadOptions(column_names=names),
            parse_options=csv.ParseOptions(delimiter="\x1f", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, kind)),
        )
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as MovieLens-1M ({error}); {COMES_FROM}") from error


def _films(path: Path) -> pa.Table:
    table = _dat(path, ["item_id", "title", "genres"], pa.string())
    parts = pc.extract_regex(table["title"], r"^(?P<title>.*?)(?: \((?P<year>\d{4})\))?$")
    columns = [pc.struct_field(parts.combine_chunks(), name) for name in ("title", "year")]
    return pa.table({"item_id": table["item_id"], "title": columns[0], "year": columns[1], "genres": table["genres"]})


def _users(path: Path) -> pa.Table:
    table = _dat(path, ["user_id", "gender", "age", "occupation", "zip"], pa.string())
    ages = [AGES.get(int(a), a) for a in table["age"].to_pylist()]
    jobs = np.array(JOBS, dtype=object)[table["occupation"].cast(pa.int64()).to_numpy()]
    return table.set_column(2, "age", pa.array(ages)).set_column(3, "occupation", pa.array(jobs, pa.string()))


@hookimpl
def datasets() -> list[type[Dataset]]:
    return [MovieLens1M]
