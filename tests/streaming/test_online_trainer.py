"""Training goes on from a bundle as if it had never stopped, and knows what it changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as dataclass_replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from engine.bundle import Bundle, diff, verify, write_bundle
from engine.components import EmbeddingMethod, Memory
from engine.config import ComponentConfig
from engine.config_learning import LearningConfig
from engine.errors import BundleError
from engine.plugins import Plugins
from engine.training import checkpoint
from engine.training.distributed import World
from engine.training.loop import TrainResult, train
from engine.training.online import OnlineTrainer

ALONE = World(0, 1, torch.device("cpu"))
TWICE = {"epochs": 2, "batch_size": 128, "threads": 1, "early_stopping": {"metric": "none"}, "calibration": "none"}


@dataclass
class Small:
    """A model of films trained for one epoch, as a bundle, and what trains it further."""

    config: Any
    data: Any
    plugins: Plugins
    bundle: Bundle


def trained(config: Any, data: Any, plugins: Plugins, out: Path) -> TrainResult:
    return train(config, data, out, plugins=plugins)


def bundled(config: Any, data: Any, plugins: Plugins, out: Path, **changes: Any) -> Bundle:
    result = trained(config, data, plugins, out / "run")
    parts = {"model": result.model, "optimizer": result.optimizer, "calibration": {}} | changes
    from engine.train_command import calibrate

    parts["calibration"] = calibrate(config, result.validation)
    return write_bundle(out / "bundle", config=config, prepared=data, metrics={}, plugins=plugins, **parts)


@pytest.fixture(scope="module")
def small(films: Any, film_data: Any, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Small:
    config = films.config(
        interest={"name": "din"}, training=TWICE | {"epochs": 1}, embedding={"name": "full", "dim": 6}
    )
    return Small(config, film_data, plugins, bundled(config, film_data, plugins, tmp_path_factory.mktemp("online")))


@pytest.fixture
def trainer(small: Small) -> OnlineTrainer:
    return OnlineTrainer(small.bundle, LearningConfig(), small.plugins)


def batches(small: Small, count: int = 3, size: int = 64) -> list[Any]:
    return list(islice(small.data.batches("train", size, shuffle_seed=3), count))


def labels_of(batch: Any) -> np.ndarray:
    return batch.labels["liked"].numpy()[:, None]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_second_epoch_from_the_bundle_gives_the_weights_of_a_run_of_two(
    films: Any, small: Small, tmp_path: Path
) -> None:
    """Width 6 is padded to 8 in training; Adam's step count and moments and Adagrad's sums go on. PReLU has no
    statistics of its batch, as Dice has."""
    prelu = small.config.model_copy(update={"interest": ComponentConfig(name="din", options={"activation": "prelu"})})
    config = prelu.model_copy(update={"training": small.config.training.model_copy(update={"epochs": 2})})
    whole = trained(config, small.data, small.plugins, tmp_path)
    online = OnlineTrainer(bundled(prelu, small.data, small.plugins, tmp_path), LearningConfig(), small.plugins)
    seed = (config.seed * 1_000_003 + 1) % (1 << 31)
    for batch in small.data.batches("train", 128, shuffle_seed=seed):
        online.step(batch, labels_of(batch))
    same(online.frozen().state_dict(), whole.model.state_dict())
    assert whole.optimizer is not None
    same(online.optimizer_state(), whole.optimizer)


def test_running_statistics_stay_those_of_the_bundle(small: Small, trainer: OnlineTrainer) -> None:
    for batch in batches(small):
        trainer.step(batch, labels_of(batch))
    before, after = small.bundle.frozen_tensors(), trainer.dense()
    held = [name for name in after if "running_" in name]
    assert len(held) == 4
    assert all(torch.equal(after[name], before[name]) for name in held)
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_scores_before_the_first_step_are_the_bundles(small: Small, trainer: OnlineTrainer) -> None:
    batch = batches(small, 1)[0]
    with torch.inference_mode():
        expected = small.bundle.model(small.plugins)(batch)["liked"].numpy()
    np.testing.assert_allclose(trainer.score(batch)["liked"], expected, atol=1e-6)
    trainer.step(batch, labels_of(batch))
    assert np.abs(trainer.score(batch)["liked"] - expected).max() > 1e-4


def test_without_optimizer_state_training_starts_fresh_and_says_so(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small.config.model_copy(
        update={"training": small.config.training.model_copy(update={"keep_optimizer": False})}
    )
    bundle = bundled(config, small.data, small.plugins, tmp_path)
    assert "optimizer.safetensors" not in bundle.manifest.files
    with caplog.at_level(logging.WARNING, logger="plexrank.learning"):
        online = OnlineTrainer(bundle, LearningConfig(), small.plugins)
    assert "keeps no optimizer state" in caplog.text
    assert all(not v.any() for n, v in online.optimizer_state().items() if n.startswith("tables/"))
    online.step(batches(small, 1)[0], labels_of(batches(small, 1)[0]))


def test_the_touched_rows_are_those_that_changed_and_no_others(small: Small, trainer: OnlineTrainer) -> None:
    before = {t: trainer.rows(t, np.arange(n)) for t, n in trainer.tables.items()}
    for batch in batches(small, 2, size=4):
        trainer.step(batch, labels_of(batch))
    count = trainer.touched
    tables, _ = trainer.take_delta()
    assert count == sum(len(part.rows) for part in tables.values())
    for table, values in before.items():
        after = trainer.rows(table, np.arange(len(values)))
        changed = np.flatnonzero((after != values).any(axis=1))
        touched = tables[table].rows if table in tables else np.empty(0, np.int64)
        assert set(changed) <= set(touched)
        assert len(touched) < len(values), "a batch of four does not touch all"
        if table in tables:
            np.testing.assert_array_equal(tables[table].values, after[touched])
    assert trainer.touched == 0
    assert trainer.take_delta() == ({}, {})


def test_deltas_put_on_the_bundle_give_the_trained_model(small: Small, trainer: OnlineTrainer) -> None:
    state = {n: v.clone() for n, v in small.bundle.frozen_tensors().items()}
    for number, batch in enumerate(batches(small, 4)):
        trainer.step(batch, labels_of(batch))
        tables, dense = trainer.take_delta(dense=number % 2 == 1)
        assert bool(dense) == (number % 2 == 1)
        for table, part in tables.items():
            state[f"embedding.weights.{table}"][torch.from_numpy(part.rows)] = torch.from_numpy(part.values)
        state.update(dense)
    assert any("running" in name for name in state), "Dice keeps statistics"
    same(state, trainer.frozen().state_dict())


def test_rows_without_a_label_say_nothing(small: Small, trainer: OnlineTrainer) -> None:
    """The loss is the mean over the rows that are labelled: -log of their probability by hand."""
    batch = batches(small, 1)[0]
    labels = labels_of(batch).copy()
    labels[::2] = np.nan
    trainer.core.sharded.eval()  # Dice by its running statistics, so that a row's score does not hang on the others
    trainer._training = True
    logits = trainer.core.model(batch)["liked"].detach().numpy()[1::2].astype(np.float64)
    signs = 2 * labels[1::2, 0] - 1
    expected = np.log1p(np.exp(-signs * logits)).mean()
    assert trainer.step(batch, labels) == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_any_label_changes_no_score_by_its_gradient(small: Small, trainer: OnlineTrainer) -> None:
    batch = batches(small, 1)[0]
    assert trainer.step(batch, np.full((batch.targets, 1), np.nan, np.float32)) == 0.0


def test_thinned_negatives_leave_the_probability_of_the_whole_stream(films: Any, small: Small) -> None:
    """Of rows of which a tenth is positive, negatives are kept with 0.25: the sample's share of positives is
    0.1 / (0.1 + 0.225) = 0.308; the model must still say 0.1."""
    rate = 0.25
    learning = LearningConfig.model_validate({"join": {"negatives": rate}})
    trainer = OnlineTrainer(small.bundle, learning, small.plugins)
    batch = small.data.batch(np.repeat(small.data._rows("train", False)[:1], 65))
    labels = np.zeros((65, 1), np.float32)
    labels[:20] = 1  # 20 / 65 = 0.3077
    for _ in range(400):
        trainer.step(batch, labels)
    assert 1 / (1 + np.exp(-trainer.score(batch)["liked"][0])) == pytest.approx(0.1, abs=0.01)


def test_weights_count_as_repeated_rows(small: Small) -> None:
    batch = batches(small, 1)[0]
    labels = labels_of(batch)
    ones, none = (OnlineTrainer(small.bundle, LearningConfig(), small.plugins) for _ in range(2))
    ones.step(batch, labels, np.ones(batch.targets, np.float32))
    none.step(batch, labels)
    for name, value in ones.frozen().state_dict().items():
        torch.testing.assert_close(value, none.frozen().state_dict()[name], rtol=0, atol=1e-6)


def test_a_checkpoint_taken_between_two_steps_goes_on_to_the_same_bits(small: Small, tmp_path: Path) -> None:
    first, second, third = batches(small, 3)
    whole = OnlineTrainer(small.bundle, LearningConfig(), small.plugins)
    whole.step(first, labels_of(first))
    whole.take_delta()
    whole.step(second, labels_of(second))
    checkpoint.write(tmp_path / "step-000000002", whole.tensors(), {"step": 2}, ALONE)
    state = copy.deepcopy(whole.state())
    again = OnlineTrainer(small.bundle, LearningConfig(), small.plugins)
    checkpoint.open_checkpoint(tmp_path / "step-000000002").read_into(again.tensors())
    again.load(state)
    for online in (whole, again):
        online.step(third, labels_of(third))
    same(whole.frozen().state_dict(), again.frozen().state_dict())
    assert whole.touched == again.touched
    (tables, dense), (again_tables, again_dense) = whole.take_delta(), again.take_delta()
    same(dense, again_dense)
    for table, part in tables.items():
        np.testing.assert_array_equal(part.rows, again_tables[table].rows)
        np.testing.assert_array_equal(part.values, again_tables[table].values)


def test_a_bundle_verifies_and_shows_what_differs_in_its_optimizer_state(small: Small, tmp_path: Path) -> None:
    assert verify(small.bundle.path, small.plugins).ok
    state = small.bundle.optimizer()
    assert state is not None
    changed = {n: v + 1 if n.startswith("tables/") else v for n, v in state.items()}
    model = small.bundle.model(small.plugins)
    other = write_bundle(
        tmp_path / "b",
        config=small.config,
        model=model,
        prepared=small.data,
        calibration=small.bundle.calibration,
        metrics={},
        optimizer=changed,
        plugins=small.plugins,
    )
    found = diff(small.bundle.path, other.path)["tensors"]
    assert set(found) == {f"optimizer.safetensors:{n}" for n in state if n.startswith("tables/")}
    short = {n: v[:-1] if n.startswith("tables/") else v for n, v in state.items()}
    bad = write_bundle(
        tmp_path / "short",
        config=small.config,
        model=model,
        prepared=small.data,
        calibration=small.bundle.calibration,
        metrics={},
        optimizer=short,
        plugins=small.plugins,
    )
    assert "not one sum a row" in verify(bad.path).problems[0]
    with pytest.raises(BundleError, match="not one sum a row"):
        OnlineTrainer(bad, LearningConfig(), small.plugins)


class HashedPlane(EmbeddingMethod):
    """Ids to sines of their fingerprints, through one matrix: a method without tables."""

    name = "hashed-plane"

    def __init__(self, features: Any, options: Any, statistics: Any) -> None:
        super().__init__(features, options, statistics)
        self.planes = nn.ModuleDict({f.name: nn.Linear(4, f.dim) for f in features})

    @property
    def widths(self) -> dict[str, int]:
        return {f.name: f.dim for f in self.features if f.dim is not None}

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        found = {}
        for name, values in ids.to_dict().items():
            angles = (values.values()[:, None] >> torch.arange(0, 32, 8)) % 251
            found[name] = JaggedTensor(self.planes[name](torch.sin(angles.float())), lengths=values.lengths())
        return found

    def memory_bytes(self) -> Memory:
        return Memory(0, 0)

    def touched_rows(self, ids: KeyedJaggedTensor) -> dict[str, Tensor]:
        return {}

    def freeze(self) -> nn.Module:
        return copy.deepcopy(self)


class _WithHashedPlane(Plugins):
    def get(self, kind: str, name: str) -> type[Any]:
        return HashedPlane if name == HashedPlane.name else super().get(kind, name)

    def origin(self, kind: str, name: str) -> tuple[str, str]:
        return ("tests", "0") if name == HashedPlane.name else super().origin(kind, name)


def test_a_method_without_tables_is_dense_as_a_whole(films: Any, film_data: Any, tmp_path: Path) -> None:
    plugins = _WithHashedPlane()
    config = films.config(embedding={"name": "hashed-plane", "dim": 8}, training=TWICE | {"epochs": 1})
    bundle = bundled(config, film_data, plugins, tmp_path)
    online = OnlineTrainer(bundle, LearningConfig(), plugins)
    state = {n: v.clone() for n, v in bundle.frozen_tensors().items()}
    batch = next(iter(film_data.batches("train", 64)))
    before = online.score(batch)["liked"]
    online.step(batch, labels_of(batch))
    tables, dense = online.take_delta()
    assert not tables
    assert any(name.startswith("embedding.planes") for name in dense)
    state.update(dense)
    same(state, online.frozen().state_dict())
    assert np.abs(online.score(batch)["liked"] - before).max() > 0


def test_rates_of_the_stream_replace_those_of_training(small: Small) -> None:
    """Row-wise Adagrad moves a row in proportion to its rate; twice the rate moves it twice as far."""
    batch = batches(small, 1)[0]
    moved = []
    for rate in (0.01, 0.02):
        online = OnlineTrainer(small.bundle, LearningConfig(embedding_lr=rate), small.plugins)
        table = next(iter(online.tables))
        before = online.rows(table, np.arange(online.tables[table]))
        online.step(batch, labels_of(batch))
        moved.append(online.rows(table, np.arange(online.tables[table])) - before)
    np.testing.assert_allclose(2 * moved[0], moved[1], atol=1e-6)
    assert np.abs(moved[0]).max() > 1e-4


def test_the_batch_of_the_caller_is_left_as_it_was(small: Small, trainer: OnlineTrainer) -> None:
    batch = batches(small, 1)[0]
    kept = dataclass_replace(batch)
    trainer.step(batch, np.zeros((batch.targets, 1), np.float32))
    assert torch.equal(batch.labels["liked"], kept.labels["liked"])
