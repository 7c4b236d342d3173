"""What `check_data` finds in logs that were spoilt on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import Config
from engine.data.validate import check_data
from engine.errors import DataError
from engine.plugins import Plugins

Found = dict[str, tuple[str, str]]
ROWS = 2000


def log() -> dict[str, Any]:
    """Labels by chance: nothing predicts them."""
    rng = np.random.default_rng(3)
    return {
        "user": rng.integers(50, size=ROWS),
        "item": rng.integers(40, size=ROWS),
        "time": 1_700_000_000 + np.arange(ROWS),
        "label": rng.integers(2, size=ROWS),
        "price": rng.normal(size=ROWS),
    }


FEATURES: list[dict[str, Any]] = [
    {"name": "user", "side": "user"},
    {"name": "item"},
    {"name": "price", "kind": "numeric"},
]


@pytest.fixture
def check(tmp_path: Path, plugins: Plugins) -> Callable[..., Found]:
    def run(columns: dict[str, Any], features: list[dict[str, Any]] | None = None, **data: Any) -> Found:
        pq.write_table(pa.table(columns), tmp_path / "log.parquet")
        section = {
            "source": {"interactions": str(tmp_path / "log.parquet")},
            "user": "user",
            "item": "item",
            "time": "time",
            "labels": {"click": {"column": "label"}},
        } | data
        config = Config.model_validate({"name": "checked", "data": section, "features": features or FEATURES})
        return {c.name: (c.status, c.detail) for c in check_data(config, plugins, cache=tmp_path / "cache")}

    return run


def test_honest_data_passes(check: Callable[..., Found]) -> None:
    found = check(log())
    assert {status for status, _ in found.values()} == {"PASS"}
    assert found["rows"][1] == "train 1600, validation 200, test 200"


def test_a_feature_that_is_the_label_fails_as_a_number_and_as_an_id(check: Callable[..., Found]) -> None:
    spoilt = log() | {"paid": log()["label"] * 3.5, "state": np.where(log()["label"] == 1, "bought", "left")}
    found = check(spoilt, [*FEATURES, {"name": "paid", "kind": "numeric"}, {"name": "state", "side": "context"}])
    status, detail = found["leakage of click"]
    assert status == "FAIL"
    assert "paid (AUC 1.000)" in detail
    assert "state (AUC 1.000)" in detail
    assert "price" not in detail


def test_constant_and_empty_features_are_warned_about(check: Callable[..., Found]) -> None:
    spoilt = log() | {"site": ["x"] * ROWS, "brand": pa.nulls(ROWS, pa.string())}
    found = check(spoilt, [*FEATURES, {"name": "site"}, {"name": "brand"}])
    assert found["values of site"] == ("WARN", "the same in every row: it tells nothing")
    assert found["values of brand"] == ("WARN", "empty in every row")


def test_labels_of_one_kind_fail(check: Callable[..., Found]) -> None:
    assert check(log() | {"label": [1] * ROWS})["label rate of click in train"] == ("FAIL", "1.0000")


def test_repeated_rows_are_counted(check: Callable[..., Found]) -> None:
    doubled = {name: np.repeat(np.asarray(column)[: ROWS // 2], 2) for name, column in log().items()}
    status, detail = check(doubled)["duplicates"]
    assert status == "WARN"
    assert detail.startswith(f"{ROWS // 2} rows (50.00%)")


def test_unseen_ids_and_order_and_units_of_time(check: Callable[..., Found]) -> None:
    spoilt = log() | {"time": (1_700_000_000 + np.arange(ROWS))[::-1] * 1000, "item": np.arange(ROWS)}
    found = check(spoilt)
    assert found["unseen item"] == ("WARN", "100.0% of the test values never occur in training")
    assert found["time order"][1] == "sorted while preparing"
    assert found["time unit"][0] == "WARN"


def test_a_random_split_mixes_the_times(check: Callable[..., Found]) -> None:
    found = check(log(), split={"by": "hash", "key": "item"})
    assert found["test after train"][0] == "WARN"


def test_columns_that_do_not_fit_are_one_fail(check: Callable[..., Found]) -> None:
    assert check(log(), [*FEATURES, {"name": "prize", "kind": "numeric"}]) == {
        "columns": ("FAIL", "features[3].column: no column 'prize' feeds 'prize'; did you mean 'price'?")
    }
    assert check(log() | {"price": ["cheap"] * ROWS})["columns"][0] == "FAIL"
    assert check(log() | {"label": np.arange(ROWS)})["data"][0] == "FAIL"


def test_no_rows_are_an_error(check: Callable[..., Found]) -> None:
    with pytest.raises(DataError, match="no rows"):
        check({name: np.asarray(column)[:0] for name, column in log().items()})
