"""From a configuration to a bundle and a report, on the small world of films."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from engine.bundle import Bundle, verify
from engine.components import ScoreRequest
from engine.errors import BundleError
from engine.train_command import run_training
from engine.training.baselines import TrainingCounts, baselines, counts
from engine.training.evaluation import Predictions

RETRIEVAL = {
    "encoder": {"name": "two_tower"},
    "loss": {"name": "sampled_softmax"},
    "sampler": {"name": "mixed"},
    "retriever": {"name": "exact"},
    "epochs": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    old = os.environ.get("PLEXRANK_CACHE")
    os.environ["PLEXRANK_CACHE"] = str(folder)
    yield folder
    os.environ.pop("PLEXRANK_CACHE")
    if old is not None:
        os.environ["PLEXRANK_CACHE"] = old


@pytest.fixture(scope="module")
def run(films, plugins, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    stages = []
    figures = run_training(
        films.config(retrieval=RETRIEVAL), out, plugins=plugins, progress=lambda stage, share: stages.append(stage)
    )
    return out, figures, stages


def test_the_figures_that_scripts_read_are_there_and_are_json(run):
    out, figures, _ = run
    wanted = "auc gauc logloss ece rows_per_second seconds peak_rss_mb parameters embedding_bytes version bundle report"
    assert set(wanted.split()) <= set(figures)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(figures, allow_nan=False))
    assert figures["rows"] == {"train": 1400, "validation": 300, "test": 300}
    assert figures["judged_on"] == "test"
    assert figures["seconds"] > 0
    assert figures["retrieval"]["recall@10"] > 0


def test_the_bundle_is_whole_and_holds_the_run(run, plugins):
    out, figures, _ = run
    assert verify(out / "bundle", plugins).ok
    bundle = Bundle.open(out / "bundle")
    assert bundle.version == figures["version"]
    assert bundle.manifest.metrics["auc"] == figures["auc"]
    assert bundle.item_vectors.shape[0] == len(bundle.catalogue) == 30


def test_the_bundles_item_vectors_are_what_its_encoder_says(run, plugins):
    from engine.training.recall import encode_catalogue

    bundle = Bundle.open(run[0] / "bundle")

    class Data:
        encoder, catalogue = bundle.encoder, bundle.catalogue

    found = encode_catalogue(bundle.encoder_model(plugins), Data())
    np.testing.assert_allclose(found, bundle.item_vectors, atol=1e-6)


def test_the_bundle_scores_the_test_rows_to_the_reported_auc(run, films, film_data, plugins):
    bundle = Bundle.open(run[0] / "bundle")
    model = bundle.model(plugins)
    with torch.inference_mode():
        parts = [(model(b)["liked"].numpy(), b.labels["liked"].numpy()) for b in film_data.batches("test", 64)]
    logits, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
    assert roc_auc_score(labels, logits) == pytest.approx(run[1]["auc"], abs=1e-6)


def test_a_request_ranks_films_of_the_users_taste_higher_than_chance(run, plugins):
    """Smoke: scores are probabilities, and differ between candidates."""
    bundle = Bundle.open(run[0] / "bundle")
    request = ScoreRequest(user={"user_id": "u0"}, history={"history": ["0", "3"]}, items=[str(i) for i in range(30)])
    batch = bundle.encoder.encode_request(request, bundle.catalogue)
    with torch.inference_mode():
        p = bundle.calibration["liked"].apply(bundle.model(plugins)(batch)["liked"])
    assert ((p > 0) & (p < 1)).all()
    assert len(np.unique(p)) > 5


def test_the_report_lies_beside_the_bundle(run):
    html = (run[0] / "report.html").read_text(encoding="utf-8")
    assert "films: training report" in html
    assert "By user activity" in html
    assert "By item popularity" in html
    assert "item_mean" in html
    figures = json.loads((run[0] / "metrics.json").read_text())
    gained = (figures["auc"] - 0.5) / (figures["baselines"]["item_mean"]["auc"] - 0.5) - 1  # RelaImpr
    assert f">{gained:.4g}<" in html


def test_stages_are_told(run):
    assert "writing the bundle" in run[2]


def test_a_second_run_takes_the_place_of_the_first_and_publishes(films, plugins, cache, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(plugins, "notify", lambda moment, **arguments: told.append((moment, arguments)) or [])
    first = run_training(films.config(training={"epochs": 1, "threads": 1}), tmp_path, plugins=plugins)
    second = run_training(films.config(training={"epochs": 1, "threads": 1}, seed=5), tmp_path, plugins=plugins)
    assert first["version"] != second["version"] == Bundle.open(tmp_path / "bundle").version
    published = [arguments for moment, arguments in told if moment == "on_publish"]
    assert [p["manifest"]["version"] for p in published] == [first["version"], second["version"]]


def test_a_folder_that_is_no_bundle_is_refused_before_training(films, plugins, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.doc").write_text("years of work")
    with pytest.raises(BundleError, match="is no bundle"):
        run_training(films.config(), tmp_path, plugins=plugins)
    assert (tmp_path / "bundle" / "thesis.doc").exists()


def test_a_model_with_state_outside_its_state_dict_is_not_published(films, plugins, cache, tmp_path, monkeypatch):
    """What was written must score as what was trained: the reopened model is made to disagree."""
    whole = Bundle.model

    def forgetful(self, plugins):
        model = whole(self, plugins)
        with torch.no_grad():
            for parameter in model.ranker.parameters():
                parameter.add_(0.1)
        return model

    monkeypatch.setattr(Bundle, "model", forgetful)
    with pytest.raises(BundleError, match="keeps state outside its state_dict"):
        run_training(films.config(training={"epochs": 1, "threads": 1}), tmp_path, plugins=plugins)
    assert not (tmp_path / "bundle").exists()


def test_without_validation_and_test_parts_a_bundle_still_comes_out(films, plugins, cache, tmp_path):
    data = films.config().data.model_dump(mode="json") | {"split": {"by": "time", "validation": 0, "test": 0}}
    config = films.config(data=data, training={"epochs": 1, "threads": 1})
    figures = run_training(config, tmp_path, plugins=plugins)
    assert figures["auc"] is None
    assert Bundle.open(tmp_path / "bundle").calibration["liked"].kind == "none"


# ---------------------------------------------------------------------------------------------- baselines
def test_the_item_mean_by_hand(film_data):
    seen = TrainingCounts.of(film_data)
    item = film_data.catalogue.prints[4]
    labels, keys = (np.concatenate(c) for c in zip(*[(y, i) for y, _, i in film_data.outcomes("train")], strict=True))
    mine = labels[keys == item]
    expected = (mine.sum() + 10 * labels.mean()) / (len(mine) + 10)
    assert seen.item_mean(np.array([item, 12345]))[0] == pytest.approx(expected, rel=1e-4)
    assert seen.item_mean(np.array([12345]))[0] == pytest.approx(labels.mean(), rel=1e-4)  # an item nobody saw
    assert counts(seen.impressions, np.array([item, 12345])).tolist() == [len(mine), 0]


def test_baselines_are_judged_as_the_model_is(film_data):
    y, users, items = (np.concatenate(c) for c in zip(*film_data.outcomes("test"), strict=True))
    found = baselines(TrainingCounts.of(film_data), Predictions({"liked": y}, {"liked": y}, users, items), "liked")
    assert found["mean_label"]["auc"] == 0.5
    assert found["item_mean"]["auc"] == pytest.approx(
        roc_auc_score(y, TrainingCounts.of(film_data).item_mean(items)), abs=1e-12
    )


@pytest.mark.slow
def test_under_torchrun_one_process_writes_and_prints(films, cache, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "from engine.config import Config\nfrom engine.train_command import run_training\n"
        "print('FIGURES', json.dumps(run_training(Config(**json.loads(sys.argv[1])), Path(sys.argv[2]))))\n"
    )
    config = films.config(training={"epochs": 1, "threads": 1, "batch_size": 128}, retrieval=RETRIEVAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, config.model_dump_json(), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=root, timeout=240,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line.removeprefix("FIGURES ")) for line in done.stdout.splitlines() if "FIGURES" in line]
    assert sorted(map(len, printed))[0] == 0
    assert max(printed, key=len)["version"] == Bundle.open(tmp_path / "out" / "bundle").version
