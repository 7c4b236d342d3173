"""Variants side by side: what is crossed, what is averaged, what is paired."""

from __future__ import annotations

import json
import statistics
from xml.etree import ElementTree

import pytest

from engine import compare as module
from engine.compare import compare, table
from engine.errors import ConfigError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLEXRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def compared(films, plugins, cache, tmp_path_factory):
    """Really trained: mean against attention, two seeds, one epoch each."""
    out = tmp_path_factory.mktemp("compare")
    config = films.config(training={"epochs": 1, "batch_size": 128, "threads": 1})
    return out, compare(config, {"interest.name": ["mean", "attention"]}, 2, out, plugins=plugins)


@pytest.fixture
def told(monkeypatch):
    """In place of training: figures that say which configuration was trained."""
    seen = []

    def one(config, folder, plugins):
        seen.append(config)
        base = {"mean": 0.70, "attention": 0.72}.get(config.interest.name, 0.5)
        auc = base + 0.01 * (config.seed % 3)
        return {
            "auc": auc,
            "gauc": None,
            "logloss": 1 - auc,
            "ece": 0.01,
            "embedding_bytes": 1000,
            "rows_per_second": 5.0,
            "p50_ms": 1.0,
            "baselines": {"item_mean": {"auc": 0.6, "gauc": 0.61, "logloss": 0.62, "ece": 0.02}},
        }

    monkeypatch.setattr(module, "_one", one)
    return seen


def test_popularity_comes_first_then_each_variant(compared):
    _, rows = compared
    assert [r["variant"] for r in rows] == ["popularity", "mean", "attention"]
    assert rows[0]["auc_sd"] == pytest.approx(0)  # the same for both seeds
    assert rows[0]["p50_ms"] is None
    for row in rows[1:]:
        assert 0.4 < row["auc"] < 1
        assert row["embedding_bytes"] > 0
        assert 0 < row["p50_ms"] < 1000
        assert row["rows_per_second"] > 0


def test_json_page_and_plot_are_written_and_checkpoints_are_not_kept(compared):
    out, rows = compared
    written = json.loads((out / "compare.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert len(written["runs"]["mean"]) == 2
    assert ElementTree.parse(out / "compare.svg").getroot().tag.endswith("svg")
    assert "popularity" in (out / "compare.html").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.json", "compare.svg"]


def test_two_keys_are_crossed_with_the_same_seeds_for_all(films, plugins, told, tmp_path):
    vary = {"interest.name": ["mean", "attention"], "embedding.dim": ["4", "8"]}
    rows = compare(films.config(seed=7), vary, 3, tmp_path, plugins=plugins)
    assert [r["variant"] for r in rows[1:]] == [
        "mean, embedding.dim=4",
        "mean, embedding.dim=8",
        "attention, embedding.dim=4",
        "attention, embedding.dim=8",
    ]
    assert [(c.interest.name, c.embedding.dim, c.seed) for c in told][:5] == [
        ("mean", 4, 7),
        ("mean", 8, 7),
        ("attention", 4, 7),
        ("attention", 8, 7),
        ("mean", 4, 8),
    ]


def test_mean_deviation_and_paired_difference_by_hand(films, plugins, told, tmp_path):
    rows = compare(films.config(), {"interest.name": ["mean", "attention"]}, 3, tmp_path, plugins=plugins)
    mean, attention = rows[1:]
    assert mean["auc"] == pytest.approx(0.71)  # .71 .72 .70
    assert mean["auc_sd"] == pytest.approx(statistics.stdev([0.71, 0.72, 0.70]))
    assert mean["auc_diff"] is None
    # paired: .02 in every seed, so no error, though each spreads by .01
    assert attention["auc_diff"] == pytest.approx(0.02)
    assert attention["auc_diff_se"] == pytest.approx(0, abs=1e-12)
    assert attention["logloss_diff"] == pytest.approx(-0.02)
    assert attention["gauc"] is None
    assert attention["gauc_diff"] is None


def test_one_seed_has_no_deviation(films, plugins, told, tmp_path):
    row = compare(films.config(), {"interest.name": ["mean", "attention"]}, 1, tmp_path, plugins=plugins)[2]
    assert row["auc_sd"] is None
    assert row["auc_diff"] == pytest.approx(0.02)
    assert row["auc_diff_se"] is None


def test_another_component_starts_with_its_own_options_unless_they_are_varied_too(films, plugins, told, tmp_path):
    config = films.config(embedding={"name": "full", "dim": 8})
    vary = {"embedding.options.rows": ["64"], "embedding.name": ["hashing"]}
    option = next(iter(plugins.get("embeddings", "hashing").Options.model_fields))
    vary = {f"embedding.options.{option}": ["64"], "embedding.name": ["hashing"]}
    compare(config, vary, 1, tmp_path, plugins=plugins)
    assert told[0].embedding.name == "hashing"
    assert told[0].embedding.options[option] in (64, "64")


def test_nothing_varied_measures_the_configuration_itself(films, plugins, told, tmp_path):
    assert [r["variant"] for r in compare(films.config(), {}, 1, tmp_path, plugins=plugins)] == ["popularity", "films"]


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"interest.name": ["mean", "meen"]}, "did you mean 'mean'"),
        ({"interst.name": ["mean"]}, "interst"),
        ({"training.epochs": ["-1"]}, "training.epochs"),
        ({"seed": [str(i) for i in range(65)]}, "at most 64"),
    ],
)
def test_what_the_configuration_refuses_is_refused_before_any_training(films, plugins, told, tmp_path, vary, says):
    with pytest.raises(ConfigError, match=says):
        compare(films.config(), vary, 1, tmp_path, plugins=plugins)
    assert told == []


def test_the_table_is_short_and_says_what_is_unknown():
    rows = [
        {"variant": "popularity", "auc": 0.7, "auc_sd": 0.0},
        {"variant": "din", "auc": 0.714, "auc_sd": 0.003, "embedding_bytes": 2048, "p50_ms": 1.234, "auc_diff": 0.012,
         "auc_diff_se": 0.001},
    ]  # fmt: skip
    columns, cells = table(rows)
    assert len(columns) == len(cells[0]) == len(cells[1])
    assert cells[0][1] == "0.7000 ± 0.0000"
    assert cells[0][-1] == "–"
    assert cells[1][-1] == "+0.0120 ± 0.0010"
    assert "2 KiB" in cells[1]
    assert "1.23 ms" in cells[1]
