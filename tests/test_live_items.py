"""Item events enter what is served: found, ranked, named as changed, kept between starts, over bundles and deltas."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.bundle import Bundle
from engine.components import LogRecord, ScoreRequest, UserState
from engine.deadline import Deadline
from engine.errors import BundleError, EventError
from engine.events import EventLimits
from engine.item_file import ItemFile, Said
from engine.live_items import LiveItems
from engine.pipeline import Pipeline, Query
from engine.plugins import Plugins
from engine.served import Served
from engine.streaming.deltas.delta import Delta, ItemVectors, TableRows
from engine.streaming.events.decode import decode_records
from plugins.scorers.inproc import InprocScorer
from plugins.state.sqlite import SqliteStateStore

NOW = 1_800_000_000.0
WAR = {"genres": ["war", "all"], "year": 1985, "title": "New <one>"}


class World:
    """A pipeline over the tiny bundle with its real scorer, sources and retriever."""

    def __init__(self, bundle: Path, plugins: Plugins, folder: Path) -> None:
        self.bundle, self.plugins = bundle, plugins
        self.scorer = InprocScorer(InprocScorer.Options())
        self.scorer.load(bundle)
        store = SqliteStateStore(SqliteStateStore.Options(path=str(folder / "state")), 100)
        self.pipeline = Pipeline(Served.open(bundle, None, plugins), self.scorer, store, plugins)
        self.live = LiveItems(self.pipeline, self.scorer, path=folder / "items.ndjson", interval=0.0)

    @property
    def served(self) -> Served:
        return self.pipeline.served

    def say(self, item: str, features: dict[str, Any], seconds: float = NOW) -> None:
        self.live.add(item, features, seconds)
        assert self.live.flush()

    def recommend(self, count: int = 60) -> list[str]:
        answer = self.pipeline.recommend(Query("r", Deadline(10.0), history=["4", "7"]), count)
        assert not answer.degraded
        return answer.items

    def close(self) -> None:
        self.live.close()
        self.pipeline.close()
        self.pipeline.store.close()


@pytest.fixture
def world(tiny_bundle: Path, plugins: Plugins, tmp_path: Path) -> Iterator[World]:
    made = World(tiny_bundle, plugins, tmp_path)
    yield made
    made.close()


def found_by(served: Served, source: str) -> list[str]:
    state = UserState("", {}, ["4", "7"], [0, 0], [])
    (candidates,) = (s.candidates(state, {}, 100) for name, _, s in served.sources if name == source)
    return served.catalogue.ids(candidates.rows)


# ------------------------------------------------------------------------------------------------------- what comes
def test_a_new_item_is_found_by_every_source_and_ranked_by_its_features(world: World) -> None:
    before = world.served
    world.say("new", WAR)
    served = world.served
    assert [len(before.catalogue), len(served.catalogue)] == [30, 31]
    assert served.catalogue.title(30) == "New <one>"
    for source in ("retriever", "popular", "recent"):
        assert "new" in found_by(served, source)
        assert "new" not in found_by(before, source)  # also while the retriever already knows it
    assert found_by(served, "recent")[0] == "new"  # nothing happened later
    assert found_by(served, "popular")[-1] == "new"  # nothing is liked less often
    assert served.popular[-1] == 30
    assert served.context.latest[30] == NOW
    assert (served.context.counts[30], served.context.latest[:30].tolist()) == (0, before.context.latest.tolist())
    assert "new" in world.recommend()
    answer = world.pipeline.rank(Query("r", Deadline(10.0)), ["new", "3"], {})
    by_item = dict(zip(answer.items, answer.scores, strict=True))
    plain = InprocScorer(InprocScorer.Options())
    plain.load(world.bundle)
    given = {"genres": [WAR["genres"]], "year": [1985]}
    wanted = plain.score(ScoreRequest({}, {"item_id": []}, ["new"], item_features=given)).tasks["liked"][0]
    assert abs(by_item["new"] - wanted) < 1e-6


def test_a_new_items_vector_is_the_one_the_encoder_makes_of_it(world: World) -> None:
    """An item with all the features of item 3 but its id, and item 3 itself told again: the same vector as before."""
    three = world.served.bundle.catalogue.table.slice(3, 1).to_pylist()[0]
    before = world.served.context.vectors
    assert before is not None
    world.say("3", {"genres": three["genres"], "year": three["year"]})
    after = world.served.context.vectors
    assert after is not None
    np.testing.assert_allclose(after[:30], before, atol=1e-6)
    world.say("twin", {"genres": three["genres"], "year": three["year"]})
    world.say("other twin", {"genres": three["genres"], "year": three["year"]})
    vectors = world.served.context.vectors
    assert vectors is not None
    np.testing.assert_allclose(vectors[30], vectors[31], atol=1e-6)  # both read as an unknown id
    assert world.served.context.retriever is not None
    rows, _ = world.served.context.retriever.search(vectors[30:31], 2)
    assert set(rows[0].tolist()) == {30, 31}


def test_what_changed_is_named_for_the_log_of_rankings(world: World) -> None:
    rows = world.served.catalogue.rows(["3", "4", "nobody's"])
    assert world.served.changed_items(rows) == {}
    world.say("4", {"year": 2001, "genres": None})
    world.say("new", {"genres": ["war"]})
    assert world.served.changed_items(world.served.catalogue.rows(["3", "7"])) == {}
    assert world.served.changed_items(world.served.catalogue.rows(["3", "4", "nobody's", "new"])) == {
        "year": [None, 2001, None, None],
        "genres": [None, [], None, ["war"]],
    }


def test_a_request_that_began_with_the_old_items_ends_with_them(world: World) -> None:
    steps = world.pipeline.recommendation(Query("r", Deadline(10.0), history=["4", "7"]), 60)
    stage = next(steps)  # its state is asked for; the items come in between
    for n in range(40):
        world.live.add(f"n{n}", WAR, NOW)
    assert world.live.flush()
    answer: Any = None
    try:
        while True:
            stage = steps.send(stage.function(*stage.arguments))
    except StopIteration as end:
        answer = end.value
    assert answer.degraded == []
    assert not [item for item in answer.items if item.startswith("n")]
    assert [item for item in world.recommend() if item.startswith("n")]


# --------------------------------------------------------------------------------------------------- what is refused
def test_a_value_that_cannot_be_read_is_refused_by_name(world: World) -> None:
    with pytest.raises(EventError, match=r"data\.features\.year is numeric, got 'old'"):
        world.live.add("x", {"year": "old"}, NOW)
    world.say("x", {"year": "1999", "colour": "red"})  # a number as text is one; an attribute nobody knows is left out
    assert world.served.changed_items(np.array([30])) == {"year": ["1999"]}
    assert "colour" not in world.served.catalogue.table.column_names


def test_there_is_an_end_to_new_items(tiny_bundle: Path, plugins: Plugins, tmp_path: Path) -> None:
    world = World(tiny_bundle, plugins, tmp_path)
    world.live.most = 2
    world.say("a", {})
    world.say("b", {})
    world.say("a", {"year": 2000})
    with pytest.raises(EventError, match="2 items were added or changed"):
        world.live.add("c", {}, NOW)
    world.close()


def test_one_item_that_does_not_fit_does_not_hold_up_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.live, "check", lambda item, features: features)
    world.live._busy = False
    with world.live._changing:  # they wait, and enter together
        for n in range(20):
            world.live.add(f"n{n}", {"year": "bad" if n == 13 else n}, NOW)
    assert world.live.flush()
    assert len(world.served.catalogue) == 49
    assert world.served.catalogue.rows(["n13"]).tolist() == [-1]
    assert world.live.status() == {
        "added": 19, "changed": 0, "waiting": 0, "left_out": 0, "vectors_waiting": 0, "refused": 1,
        "newest": NOW,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is kept
def test_a_restart_knows_what_was_said(tiny_bundle: Path, plugins: Plugins, tmp_path: Path) -> None:
    world = World(tiny_bundle, plugins, tmp_path)
    world.say("new", WAR)
    world.say("new", {"year": None}, NOW + 5)
    world.say("4", {"year": 2001})
    rows = np.array([4, 30])
    changed, scores = world.served.changed_items(rows), world.scorer.score(ScoreRequest({}, {}, ["4", "new"])).tasks
    world.close()
    with (tmp_path / "items.ndjson").open("ab") as file:
        file.write(b'{"item":"torn","featu')  # a crash in mid-line
    again = World(tiny_bundle, plugins, tmp_path)
    assert again.served.changed_items(rows) == changed
    assert np.array_equal(again.scorer.score(ScoreRequest({}, {}, ["4", "new"])).tasks["liked"], scores["liked"])
    assert again.served.context.latest[30] == NOW + 5
    again.say("newer", {})
    again.close()
    third = World(tiny_bundle, plugins, tmp_path)
    assert third.served.catalogue.rows(["newer", "torn"]).tolist() == [31, -1]
    third.close()


def test_the_file_is_written_anew_before_most_of_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.item_file._SPARE", 4)
    file, everything = ItemFile(tmp_path / "items.ndjson"), {}
    for n in range(50):
        said = Said(f"i{n % 3}", {"n": n}, float(n))
        everything[said.item] = said
        file.write([said], everything)
        assert len(file.path.read_bytes().splitlines()) <= 10
    assert ItemFile(file.path).read() == everything
    assert [p.name for p in tmp_path.iterdir()] == ["items.ndjson"]


def test_a_file_that_cannot_be_written_costs_no_answer(
    tiny_bundle: Path, plugins: Plugins, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tiny_bundle, plugins, tmp_path)
    (tmp_path / "items.ndjson").mkdir()
    world.say("new", WAR)
    world.say("newer", WAR)
    assert len(world.served.catalogue) == 32
    assert len([r for r in caplog.records if "not kept between starts" in r.getMessage()]) == 1
    world.close()


def event(item: str, features: dict[str, Any], kind: str = "item") -> bytes:
    data = {"item": item, "features": features} if kind == "item" else {"type": "click", "user": "u", "item": item}
    return msgspec.json.encode(
        {"specversion": "1.0", "id": item, "source": "s", "type": kind, "time": "2027-01-15T08:00:00Z", "data": data}
    )


def test_the_logs_item_events_enter_in_their_order(world: World) -> None:
    records = [
        LogRecord(0, 0, "", event("a", {"year": 1990})),
        LogRecord(0, 1, "u", event("3", {}, "interaction")),
        LogRecord(0, 2, "", b"not JSON"),
        LogRecord(0, 3, "", event("a", {"year": 1991})),
        LogRecord(0, 4, "", event("b", {"year": "bad"})),
        LogRecord(0, 5, "", event("c", {"genres": "war"})),
    ]
    items = decode_records(records, EventLimits(), NOW, float("inf")).items
    world.live.add_events(items)
    assert world.live.flush()
    assert len(items) == 4
    assert world.live.refused == 1
    rows = world.served.catalogue.rows(["a", "b", "c"])
    assert rows.tolist() == [30, -1, 31]
    assert world.served.changed_items(rows) == {"year": [1991, None, None], "genres": [None, None, "war"]}


# ------------------------------------------------------------------------------------------------ bundles and deltas
def test_another_bundle_takes_over_what_was_said(world: World) -> None:
    world.say("new", WAR)
    score = world.scorer.score(ScoreRequest({}, {}, ["new"])).tasks["liked"]
    world.scorer.load(world.bundle)
    world.live.swap(Served.open(world.bundle, None, world.plugins))
    assert "new" in world.recommend()
    assert np.array_equal(world.scorer.score(ScoreRequest({}, {}, ["new"])).tasks["liked"], score)
    world.say("newer", WAR)
    assert {"new", "newer"} <= set(world.recommend())


def overflowing(served: Served, genre: str) -> Served:
    """Its encoder reads a genre as the largest numbers there are: what it makes of such an item is not finite."""
    tower = served.tower
    assert tower is not None
    index = served.bundle.encoder
    row = tower.embedding.placer({"genres": torch.from_numpy(index.encode_values("genres", [[genre]]).values)})[
        "genres"
    ]
    values = np.full((1, tower.embedding.weights["t_genres"].shape[1]), 3e38, np.float32)
    part = Delta(
        "tiny", served.bundle.version, 0, 1, 0.0, 0.0,
        tables={"t_genres": TableRows(row.numpy(), values)},
        dense={n: t * 100 for n, t in tower.state_dict().items() if n.startswith("encoder.")},
    )  # fmt: skip
    return served.with_encoder(part)


def test_an_item_without_a_finite_vector_is_left_out_by_name_and_the_others_take_over(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.say("new", WAR)
    world.say("calm", {"genres": ["drama"], "year": 1990})
    world.scorer.load(world.bundle)
    world.live.swap(overflowing(Served.open(world.bundle, None, world.plugins), "war"))
    assert world.served.catalogue.rows(["new", "calm"]).tolist() == [-1, 30]
    assert "calm" in world.recommend()
    assert "item 'new' is left as before: the encoder makes no finite vector of 'new'" in caplog.text
    counted = world.live.status()
    assert (counted["added"], counted["changed"], counted["left_out"], counted["refused"]) == (1, 0, 1, 1)
    world.say("calm", WAR)  # as it was before
    assert world.served.changed_items(np.array([30])) == {"genres": [["drama"]], "year": [1990]}
    world.say("new", {"genres": ["drama"]})  # what else was said of it holds
    assert world.served.changed_items(world.served.catalogue.rows(["new"])) == {"genres": [["drama"]], "year": [1985]}
    assert world.live.status()["left_out"] == 0


def test_an_item_that_one_bundle_left_out_is_there_with_the_next(world: World) -> None:
    world.say("new", WAR)
    world.scorer.load(world.bundle)
    world.live.swap(overflowing(Served.open(world.bundle, None, world.plugins), "war"))
    assert "new" not in world.recommend()
    world.live.swap(Served.open(world.bundle, None, world.plugins))
    assert "new" in world.recommend()
    assert world.live.status()["left_out"] == 0


def learnt(world: World, vectors: ItemVectors) -> None:
    """A delta that brings vectors alone."""
    world.live.take_encoder(Delta("tiny", world.served.bundle.version, 0, 1, 0.0, 0.0, tables={}, vectors=vectors))


def test_a_learners_vectors_move_items_in_the_retriever(world: World) -> None:
    """Every item but 7 is turned away from the user, so that 7 is found first; items that come later find theirs."""
    served = world.served
    assert served.context.vectors is not None
    width = served.context.vectors.shape[1]
    query = np.asarray(served.context.encode_user(UserState("", {}, ["4", "7"], [0, 0], []), {}))
    ids = [str(n) for n in range(30)] + ["later"]
    values = np.stack([query if item in ("7", "later") else -query for item in ids]).astype(np.float32)
    mapped = served.bundle.item_vectors
    assert mapped is not None
    untouched = mapped.copy()
    learnt(world, ItemVectors(ids, values))
    assert found_by(world.served, "retriever")[0] == "7"
    assert world.live.status()["vectors_waiting"] == 1
    world.say("later", WAR)
    assert set(found_by(world.served, "retriever")[:2]) == {"7", "later"}
    world.say("7", {"year": 1950})  # the learner's vector is newer than what the bundle's encoder would make
    assert set(found_by(world.served, "retriever")[:2]) == {"7", "later"}
    learnt(world, ItemVectors(["7", "7"], np.stack([query, -query]).astype(np.float32)))
    assert found_by(world.served, "retriever")[0] == "later"  # of two for one item the last counts
    assert np.array_equal(untouched, mapped)  # the bundle's own are as they were
    with pytest.raises(BundleError, match=f"of width {width} are wanted"):
        learnt(world, ItemVectors(["7"], np.zeros((1, width + 1), np.float32)))
    with pytest.raises(BundleError, match="finite"):
        learnt(world, ItemVectors(["7"], np.full((1, width), np.nan, np.float32)))


def test_the_encoder_goes_where_a_learner_took_it_together_with_its_items(world: World) -> None:
    """Rows of users and a tower; what does not fit leaves users and items as they were."""
    served, state = world.served, UserState("u3", {}, ["4", "7"], [0, 0], [])
    tower, encode = served.tower, served.context.encode_user
    assert tower is not None
    table = tower.embedding.weights["t_user_id"]  # type: ignore[union-attr, index]
    part = Delta(
        "tiny", world.served.bundle.version, 0, 1, 0.0, 0.0,
        tables={"t_user_id": TableRows(np.arange(len(table)), -table.numpy())},
        dense={n: t * 0.5 for n, t in tower.state_dict().items() if n.startswith("encoder.")},
    )  # fmt: skip
    before = encode(state, {})
    width = len(before)
    wrong = ItemVectors(["3"], np.zeros((1, width + 1), np.float32))
    with pytest.raises(BundleError, match="are wanted"):
        world.live.take_encoder(replace(part, vectors=wrong))
    with pytest.raises(BundleError, match="no such table"):
        world.live.take_encoder(replace(part, tables={"t_shoe": part.tables["t_user_id"]}))
    world.live.take_encoder(replace(part, base="0123456789ab"))
    assert np.array_equal(encode(state, {}), before)
    reference = Served.open(world.bundle, None, world.plugins)
    assert reference.tower is not None
    wanted = reference.tower.state_dict() | dict(part.dense)
    wanted["embedding.weights.t_user_id"] = torch.from_numpy(part.tables["t_user_id"].values)
    reference.tower.load_state_dict(wanted)
    world.live.take_encoder(replace(part, vectors=ItemVectors(["3"], before[None] * 9)))
    np.testing.assert_allclose(
        world.served.context.encode_user(state, {}), reference.context.encode_user(state, {}), atol=1e-6
    )
    assert np.array_equal(world.served.context.vectors[3], before * 9)  # type: ignore[index]
    world.say("new", WAR)  # its vector is made by the encoder as it is now
    np.testing.assert_allclose(
        world.served.context.vectors[30],  # type: ignore[index]
        reference.with_items(["new"], [WAR], [NOW]).context.vectors[30],  # type: ignore[index]
        atol=1e-6,
    )


def test_a_bundle_without_an_encoder_takes_new_items_but_no_vectors(
    films: Any, plugins: Plugins, tmp_path: Path
) -> None:
    from engine.train_command import run_training

    run_training(films.config(training={"epochs": 1, "threads": 1}), tmp_path / "run", plugins=plugins)
    world = World(tmp_path / "run" / "bundle", plugins, tmp_path)
    world.say("new", WAR)
    assert "new" in world.recommend()
    with pytest.raises(BundleError, match="no retrieval encoder"):
        learnt(world, ItemVectors(["7"], np.zeros((1, 4), np.float32)))
    world.close()


def test_answers_go_on_while_items_come(world: World) -> None:
    done, faults = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            answer = world.pipeline.recommend(Query("r", Deadline(30.0), history=["4", "7"]), 60)
            if answer.degraded or not np.isfinite(answer.scores).all():
                faults.append(answer.degraded)

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(150):
        world.live.add(f"n{n}", WAR, NOW + n)
        world.live.add(str(n % 30), {"year": 1900 + n}, NOW + n)
        if n % 10 == 0:
            assert world.live.flush()
    assert world.live.flush()
    done.set()
    for reader in readers:
        reader.join()
    assert not faults, faults[:3]
    assert len(world.served.catalogue) == 180
    assert Bundle.open(world.bundle).version == world.scorer.version
