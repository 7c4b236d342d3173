"""Two towers that go on learning: tastes that move, items that were not there, and a state that goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.components import ScoreRequest
from engine.config import Config
from engine.data.prepare import prepare
from engine.errors import BundleError, CheckpointError, ConfigError
from engine.plugins import Plugins
from engine.streaming.deltas import delta_codec
from engine.streaming.deltas.assembler import Assembler
from engine.streaming.deltas.delta import Delta, ItemVectors
from engine.streaming.deltas.encoder_delta import DENSE, TABLE, apart, with_part
from engine.streaming.learning.retrieval import OnlineRetrieval
from engine.train_command import run_training
from tests.retrieval import tastes
from tests.retrieval.tastes import ITEMS, KINDS

ROWS = 9000
MOVED = int(0.6 * ROWS)
"""The row from which a user likes the next kind: where the test part begins."""


def world(folder: Path, moved: int) -> Config:
    tastes.write(folder, ROWS, moved)
    return Config.model_validate(
        {
            **tastes.about(folder, validation=0.05, test=0.4),
            "embedding": {"name": "hashing", "dim": 6, "options": {"rows": 4096}},  # padded to 8 while it is trained
            "training": {"threads": 1, "epochs": 1},
            "retrieval": {"batch_size": 128, "epochs": 4, "lr": 0.02},
        }
    )


def trained(folder: Path, plugins: Plugins, moved: int) -> tuple[Bundle, Any]:
    config = world(folder, moved)
    run_training(config, folder / "run", plugins=plugins)
    return Bundle.open(folder / "run" / "bundle"), prepare(config, plugins)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> tuple[Bundle, Any]:
    return trained(tmp_path_factory.mktemp("moving"), plugins, MOVED)


@pytest.fixture
def learner(moving: tuple[Bundle, Any], plugins: Plugins) -> OnlineRetrieval:
    return OnlineRetrieval(moving[0], moving[0].config.learning, plugins)


def positives(bundle: Bundle, data: Any, size: int = 64) -> Any:
    """The test part as a stream of positives: batch, rows of the catalogue."""
    for batch in data.batches("test", size, positives_only=True):
        yield batch, bundle.catalogue.rows_of(batch.item_key.numpy())


@torch.no_grad()
def recall(users: torch.Tensor, vectors: np.ndarray, rows: np.ndarray) -> float:
    """Share of the rows that are among their user's best 20 items."""
    scores = users.numpy() @ vectors.T
    return float(((scores > scores[np.arange(len(rows)), rows][:, None]).sum(axis=1) < 20).mean())


def progressive(bundle: Bundle, data: Any, plugins: Plugins) -> np.ndarray:
    """[batches, 2] recall of the learner and of the frozen encoder, each batch asked before it is learned from."""
    learner = OnlineRetrieval(bundle, bundle.config.learning, plugins)
    frozen, all_items = bundle.encoder_model(plugins), np.arange(ITEMS)
    found = []
    for batch, rows in positives(bundle, data):
        now = learner.frozen()
        live = recall(now.users(batch), learner.vectors(all_items), rows)
        found.append((live, recall(frozen.users(batch), bundle.item_vectors, rows)))
        learner.step(batch, rows)
    return np.array(found)


def test_it_begins_where_the_bundle_stands(moving: tuple[Bundle, Any], learner: OnlineRetrieval) -> None:
    np.testing.assert_allclose(learner.vectors(np.arange(ITEMS)), moving[0].item_vectors, atol=1e-6)
    assert learner.take_vectors() is None
    assert learner.take_delta() == ({}, {})


def test_recall_of_the_later_stream_is_better_with_learning(moving: tuple[Bundle, Any], plugins: Plugins) -> None:
    found = progressive(*moving, plugins)
    later = found[len(found) // 2 :].mean(axis=0)
    # the frozen encoder looks for what users liked before they all moved on; 20 of 150 items at random are 0.13
    assert later[1] < 0.1
    assert later[0] > 0.4


def test_it_does_no_harm_where_nothing_moves(tmp_path: Path, plugins: Plugins) -> None:
    found = progressive(*trained(tmp_path, plugins, ROWS), plugins).mean(axis=0)
    assert found[0] > found[1] - 0.03


def test_a_new_item_becomes_retrievable_for_those_who_like_its_kind(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval
) -> None:
    """Nothing is known of it but who liked it."""
    bundle, data = moving
    learner.catalogue = bundle.catalogue.updated(["fresh"], [{}], bundle.encoder)
    new = len(learner.catalogue) - 1
    assert new == ITEMS
    assert learner.touched_items().tolist() == [new]
    taken = learner.take_vectors()
    assert taken is not None
    assert taken.ids == ["fresh"]

    batches = list(positives(bundle, data))
    asked = [batch for batch, _ in batches[-8:]]

    def rank() -> tuple[float, float]:
        """Mean place of the new item, for the users of kind 2 (in the stream) and for the others."""
        vectors = learner.vectors(np.arange(new + 1))
        place, of_kind = [], []
        for batch in asked:
            scores = learner.frozen().users(batch).numpy() @ vectors.T
            place.append((scores > scores[:, new:]).sum(axis=1))
            of_kind.append(liking(batch))
        places, which = np.concatenate(place), np.concatenate(of_kind)
        return float(places[which].mean()), float(places[~which].mean())

    prints = {int(p): n for n, p in enumerate(learner.catalogue.prints)}

    def liking(batch: Any) -> np.ndarray:
        """Rows whose user likes kind 2 after the move, told by what the user likes in the stream."""
        return np.array([users.get(int(u), -1) == 2 for u in batch.user_key])

    users: dict[int, int] = {}
    for batch, _ in batches:
        for user, item in zip(batch.user_key.tolist(), batch.item_key.tolist(), strict=True):
            users.setdefault(user, prints[item] % KINDS)
    before = rank()
    for batch, rows in batches[:-8]:
        theirs = rows.copy()
        theirs[liking(batch) & (np.arange(len(rows)) % 3 == 0)] = new  # some of them like the new item
        learner.step(batch, theirs)
    fond, others = rank()
    assert fond < 30 < before[0]  # a kind has 30 items
    assert others > 2 * fond


def test_a_delta_carries_what_changed_and_makes_the_same_encoder(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval, plugins: Plugins
) -> None:
    """Bundle + delta, written as bytes and read back, encodes users and items as the learner does."""
    bundle, data = moving
    stream = list(positives(bundle, data))
    for batch, rows in stream[:5]:
        learner.step(batch, rows)
    tables, dense = learner.take_delta()
    vectors = learner.take_vectors()
    assert vectors is not None
    assert all(name.startswith(TABLE) for name in tables)
    assert all(name.startswith(DENSE) for name in dense)
    assert sum(len(t.rows) for t in tables.values()) < sum(len(w) for w in learner._tables.values())
    sent = Delta("tastes", bundle.version, 1, 1, 0.0, 0.0, tables, dense, vectors)
    assembler, delta = Assembler(), None
    for part in delta_codec.encode(sent, "float32", 20_000):
        delta = assembler.add(part) or delta
    assert delta is not None

    ranking, part = apart(delta)
    assert (ranking.tables, ranking.dense, ranking.vectors) == ({}, {}, None)
    before = bundle.encoder_model(plugins)
    first = {name: value.clone() for name, value in before.encoder.state_dict().items()}
    served = with_part(before, part)
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, first[name])  # who began with the one before ends with its towers
    batch = stream[6][0]
    torch.testing.assert_close(served.users(batch), learner.frozen().users(batch))
    request = bundle.encoder.encode_request(ScoreRequest({"user_id": "u3"}, {}, []), bundle.catalogue)
    torch.testing.assert_close(served.users(request), learner.frozen().users(request))
    rows = bundle.catalogue.rows(delta.vectors.ids)
    np.testing.assert_allclose(delta.vectors.values, learner.vectors(rows), atol=1e-6)
    again, unchanged = learner.take_delta()
    assert again == {}
    assert unchanged == {}


def test_a_part_that_does_not_fit_is_refused_and_changes_nothing(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval, plugins: Plugins
) -> None:
    bundle, data = moving
    learner.step(*next(positives(bundle, data)))
    tables, dense = learner.take_delta()
    served = bundle.encoder_model(plugins)
    before = {name: value.clone() for name, value in served.state_dict().items()}
    _, part = apart(Delta("tastes", bundle.version, 1, 1, 0.0, 0.0, tables, {**dense, f"{DENSE}other": torch.ones(1)}))
    with pytest.raises(BundleError, match="'other' is not of the dense part"):
        with_part(served, part)
    for name, value in served.state_dict().items():
        assert torch.equal(value, before[name])


def test_all_vectors_are_refreshed_in_turn_liked_items_first(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval
) -> None:
    bundle, data = moving
    batch, rows = next(positives(bundle, data, 20))
    learner.step(batch, rows)
    liked = set(bundle.catalogue.ids(np.unique(rows)))
    first = learner.take_vectors(most=len(liked))
    assert first is not None
    assert set(first.ids) == liked
    seen: list[str] = []
    while (taken := learner.take_vectors(most=40)) is not None:
        assert len(taken.ids) <= 40
        seen += taken.ids
    assert set(seen) | liked == set(bundle.catalogue.ids(np.arange(ITEMS)))
    assert len(learner.touched_items()) == 0  # and it ends, where nothing is learned


def test_a_state_goes_on_to_the_last_bit(moving: tuple[Bundle, Any], plugins: Plugins) -> None:
    bundle, data = moving
    stream = list(positives(bundle, data, 16))[:150]  # past a refresh of the counts, and not at one

    def make() -> OnlineRetrieval:
        return OnlineRetrieval(bundle, bundle.config.learning, plugins)

    def go(learner: OnlineRetrieval, some: list[Any]) -> list[ItemVectors | None]:
        taken = []
        for number, (batch, rows) in enumerate(some):
            learner.step(batch, rows)
            if number % 7 == 0:
                taken.append(learner.take_vectors(most=30))
        return taken

    whole, half, again = make(), make(), make()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        go(whole, stream[:119])
        last = go(whole, stream[119:])
        go(half, stream[:119])
        with torch.no_grad():
            for name, value in half.tensors().items():
                target = again.tensors()[name]
                if isinstance(value, torch.Tensor):
                    target.copy_(value)
                else:
                    target.local_shards()[0].tensor.copy_(value.local_shards()[0].tensor)
        again.load({name: np.array(value) for name, value in half.state().items()})
        resumed = go(again, stream[119:])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(last, resumed, strict=True):
        assert one.ids == other.ids
        np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(whole.vectors(np.arange(ITEMS)), again.vectors(np.arange(ITEMS)))
    for name, value in whole.state().items():
        np.testing.assert_array_equal(value, again.state()[name], err_msg=name)


def test_positives_that_the_catalogue_does_not_list_teach_nothing(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval
) -> None:
    batch, rows = next(positives(*moving))
    assert learner.step(batch, np.full(len(rows), -1)) == 0.0
    assert learner.steps == 0
    assert len(learner.touched_items()) == 0


def test_what_cannot_learn_is_refused_with_what_to_set(
    moving: tuple[Bundle, Any], learner: OnlineRetrieval, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = moving[0]
    off = bundle.config.learning.model_copy(update={"retrieval": False})
    with pytest.raises(ConfigError, match=r"learning\.retrieval is false"):
        OnlineRetrieval(bundle, off, plugins)
    with pytest.raises(CheckpointError, match="knows 151 items"):
        learner.load({**learner.state(), "level": np.zeros(151, np.uint8)})
    monkeypatch.setattr(Bundle, "encoder_model", lambda self, plugins: None)
    with pytest.raises(BundleError, match=r"set learning\.retrieval: false"):
        OnlineRetrieval(bundle, bundle.config.learning, plugins)
