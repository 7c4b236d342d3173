"""A server that follows a registry and a learner's deltas: answers name the version, and turn to it at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bundle import Bundle, read_manifest
from engine.bundle.manifest import content_version, sealed
from engine.components import EventLog
from engine.errors import BundleError
from engine.streaming.deltas.delta import Delta, ItemVectors, TableRows
from engine.streaming.deltas.pointer import decode_pointer
from engine.streaming.deltas.publisher import DeltaPublisher
from engine.streaming.deltas.registry import ModelRegistry
from serving.app import serve_with
from serving.service import Service

ITEMS = [str(n) for n in range(30)]


def until(true: Callable[[], Any], what: str) -> Any:
    for _ in range(2000):
        found = true()
        if found:
            return found
        time.sleep(0.01)
    return pytest.fail(f"not within twenty seconds: {what}")


class World:
    """A registry with one version, a server that follows it, and a learner's publisher beside it."""

    def __init__(self, bundle: Path, folder: Path, listen: Any) -> None:
        self.bundle, self.folder = Bundle.open(bundle), folder
        self.registry = ModelRegistry(folder / "models")
        self.registry.publish(bundle, 1, "first")
        self.service = Service.open(None, None, folder / "state", models=folder / "models")
        self.running, self._stop = listen(serve_with(self.service))
        self.client = self.running.client
        self.streams: list[EventLog] = [self.service.log.sibling("deltas", partitions=1)]
        self.streams.append(self.service.log.sibling("models", partitions=1, compact=True))
        self.publisher = DeltaPublisher(self.streams[0], self.streams[1], self.registry)

    def delta(self, sequence: int, epoch: int = 1, *, newest: float | None = None) -> Delta:
        """All rows of the item's table, as random as the sequence says."""
        model = self.bundle.model(self.service.plugins)
        name, table = next((n, t) for n, t in model.embedding.weights.items() if len(t) >= 30)
        values = np.random.default_rng(sequence).normal(size=table.shape).astype(np.float32)
        return Delta(
            model=self.bundle.name,
            base=self.bundle.version,
            epoch=epoch,
            sequence=sequence,
            created=time.time(),
            newest=time.time() - 0.5 if newest is None else newest,
            tables={name: TableRows(np.arange(len(table)), values)},
        )

    def rank(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()
        return answer

    def scores(self) -> dict[str, float]:
        return {item["id"]: item["score"] for item in self.rank()["items"]}

    def serves(self, version: str) -> None:
        until(lambda: self.rank()["model"]["version"] == version, f"{version} serves")

    def close(self) -> None:
        self._stop()
        for stream in self.streams:
            stream.close()


@pytest.fixture
def world(tiny_bundle: Path, tmp_path: Path, listen: Any) -> Iterator[World]:
    made = World(tiny_bundle, tmp_path, listen)
    yield made
    made.close()


def test_a_learners_deltas_are_in_the_answers_and_every_answer_names_its_version(world: World) -> None:
    base = world.bundle.version
    before = world.scores()
    world.publisher.publish(world.delta(1))
    world.serves(f"{base}+1.1")
    first = world.scores()
    assert first != before
    newest = time.time() - 0.5
    world.publisher.publish(world.delta(2, newest=newest))
    world.serves(f"{base}+1.2")
    assert world.scores() not in (first, before)
    about = world.client.get("/v1/models").json()
    assert about["model"] == {"name": "tiny", "version": f"{base}+1.2"}
    assert about["base"] == base
    following = about["following"]
    assert (following["current"], following["epoch"], following["sequence"]) == (base, 1, 2)
    assert following["applied"] == 2
    assert following["trouble"] is None
    assert 0.5 <= following["newest_event_age_seconds"] <= time.time() - newest
    assert world.client.get("/health/ready").json()["model"]["version"] == f"{base}+1.2"
    assert f"{base}+1.2" in world.client.get("/?user=u1").text


def test_what_deltas_cost_and_how_fresh_they_make_it_is_measured(world: World) -> None:
    newest = time.time() - 3.0
    world.publisher.publish(world.delta(1, newest=newest))
    world.serves(f"{world.bundle.version}+1.1")
    world.rank()
    figures = world.client.get("/metrics").text
    values = {
        line.split()[0]: float(line.split()[1]) for line in figures.splitlines() if line and not line.startswith("#")
    }
    assert values["plexrank_delta_rows_count"] == values["plexrank_delta_bytes_count"] == 1
    assert values["plexrank_delta_rows_sum"] >= 30
    assert values["plexrank_delta_apply_seconds_count"] == 1
    assert values["plexrank_freshness_seconds_count"] == 1, "once a delta, whatever the number of answers"
    assert 3.0 <= values["plexrank_freshness_seconds_sum"] <= time.time() - newest
    assert values['plexrank_event_lag_seconds_count{stage="delta"}'] == 1
    assert values["plexrank_newest_event_age_seconds_count"] >= 2


def test_rankings_are_logged_with_the_deltas_version(world: World) -> None:
    world.publisher.publish(world.delta(1))
    version = f"{world.bundle.version}+1.1"
    world.serves(version)
    asked = world.rank()["request_id"]
    assert world.service.rankings is not None
    assert world.service.rankings.flush()
    events = [json.loads(record.value) for record in world.service.log.read({0: 0}, 10_000)]
    (logged,) = [event["data"] for event in events if event["id"] == asked]
    assert logged["version"] == version


def test_the_retrieval_encoder_and_its_items_vectors_follow_too(world: World) -> None:
    served = world.service.pipeline.served
    encode, tower = served.context.encode_user, served.tower
    assert encode is not None
    assert tower is not None
    user = world.service.store.get("u1")
    before = encode(user, {})
    assert served.context.vectors is not None
    vectors = np.random.default_rng(3).normal(size=(30, served.context.vectors.shape[1])).astype(np.float32)
    tables = {
        f"retrieval:{name}": TableRows(np.arange(len(table)), np.flip(table.numpy(), 0).copy())
        for name, table in tower.embedding.weights.items()  # type: ignore[union-attr]
    }
    dense = {
        f"retrieval.{name}": value * 0.5
        for name, value in tower.state_dict().items()
        if name.startswith("encoder.") and value.is_floating_point()
    }
    delta = dataclasses.replace(world.delta(1), dense=dense, vectors=ItemVectors(ITEMS, vectors))
    world.publisher.publish(dataclasses.replace(delta, tables={**delta.tables, **tables}))
    world.serves(f"{world.bundle.version}+1.1")
    now = until(
        lambda: world.service.pipeline.served if world.service.pipeline.served is not served else None, "it is taken"
    )
    np.testing.assert_array_equal(now.context.vectors[now.catalogue.rows(ITEMS)], vectors)
    assert not np.allclose(now.context.encode_user(user, {}), before)
    found = world.client.post("/v1/recommend", json={"user": "nobody", "count": 5, "timeout_ms": 10_000}).json()
    assert (len(found["items"]), found["degraded"]) == (5, [])


def another_version(bundle: Path, folder: Path) -> Path:
    """The same model as if it had been trained for longer: equal scores, another version."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    config = {**manifest.config, "training": {**manifest.config["training"], "epochs": 77}}
    version = content_version(manifest.files, config, manifest.schema_, manifest.plugins)
    fields = {**manifest.as_json(), "config": config, "version": version}
    del fields["digest"]
    (folder / "manifest.json").write_text(json.dumps(sealed(fields).as_json()))
    return folder


def test_a_new_version_takes_over_and_a_rollback_brings_the_old_one_back(world: World, tmp_path: Path) -> None:
    base = world.bundle.version
    world.publisher.publish(world.delta(1))
    world.serves(f"{base}+1.1")
    new = world.registry.publish(another_version(world.bundle.path, tmp_path / "new"), 2, "trained for longer")
    assert new.version != base
    world.serves(new.version)
    assert world.client.get("/v1/models").json()["available"] == sorted([base, new.version])
    back = world.client.post("/v1/models:rollback", json={"reason": "worse on Tuesday"})
    assert back.status_code == 200, back.text
    assert back.json() == {
        "version": base,
        "epoch": 3,
        "reason": "worse on Tuesday",
        "pinned": False,
        "previous": new.version,
    }
    world.serves(base)
    forward = world.client.post(f"/v1/models/{new.version}:promote", json={})
    assert forward.json()["epoch"] == 4
    world.serves(new.version)
    assert 'plexrank_bundle_loads_total{result="loaded"} 3.0' in world.client.get("/metrics").text


def test_a_bundle_beside_the_registry_is_not_loaded_by_name(world: World) -> None:
    answer = world.client.post("/v1/models:load", json={"name": "tiny"})
    assert answer.status_code == 409
    assert "promote a version" in answer.json()["detail"]


def test_versions_that_are_not_there_are_not_promoted(world: World) -> None:
    assert world.client.post("/v1/models/000000000000:promote", json={}).status_code == 404
    assert world.client.post("/v1/models:rollback", json={"to": "000000000000"}).status_code == 404
    nothing = world.client.post("/v1/models:rollback", json={})
    assert nothing.status_code == 409
    assert "nothing to go back to" in nothing.json()["detail"]


def test_promoting_what_serves_drops_what_was_learned_behind_it(world: World) -> None:
    base, before = world.bundle.version, world.scores()
    world.publisher.publish(world.delta(1))
    world.serves(f"{base}+1.1")
    promoted = world.client.post(f"/v1/models/{base}:promote", json={"reason": "begin anew"})
    assert promoted.status_code == 200, promoted.text
    assert (promoted.json()["version"], promoted.json()["previous"]) == (base, base)
    assert (promoted.json()["epoch"], promoted.json()["reason"]) == (2, "begin anew")
    world.serves(base)
    assert world.scores() == pytest.approx(before, abs=1e-6)
    assert world.client.get("/v1/models").json()["following"]["epoch"] == 2


def test_a_pinned_bundle_serves_as_it_is_until_it_is_unpinned(world: World) -> None:
    base, before = world.bundle.version, world.scores()
    world.publisher.publish(world.delta(1))
    world.serves(f"{base}+1.1")
    pinned = world.client.post("/v1/models:pin", json={"reason": "an audit"})
    assert pinned.status_code == 200, pinned.text
    assert pinned.json() == {"version": base, "epoch": 2, "reason": "an audit", "pinned": True, "previous": base}
    world.serves(base)
    assert world.scores() == pytest.approx(before, abs=1e-6)
    assert world.publisher.publish(world.delta(1, epoch=2)).waits
    assert world.client.get("/v1/models").json()["following"]["pinned"]
    free = world.client.post("/v1/models:unpin", json={}).json()
    assert (free["epoch"], free["pinned"], free["reason"]) == (2, False, "unpinned")
    assert world.publisher.flush()
    world.serves(f"{base}+2.1")


def test_a_rollback_by_hand_is_told_to_the_log_for_servers_elsewhere(world: World) -> None:
    promoted = world.client.post(f"/v1/models/{world.bundle.version}:promote", json={"reason": "begin anew"}).json()
    told = [decode_pointer(record.value, "models") for record in world.streams[1].read({0: 0})]
    assert told[-1] == world.registry.current()
    assert (told[-1].epoch, told[-1].reason) == (promoted["epoch"], "begin anew")


def test_a_server_without_registry_says_so(server: Any) -> None:
    about = server.client.get("/v1/models").json()
    assert about["following"] is None
    for path in ("/v1/models/000000000000:promote", "/v1/models:rollback", "/v1/models:pin", "/v1/models:unpin"):
        answer = server.client.post(path, json={})
        assert answer.status_code == 409
        assert "--models" in answer.json()["detail"]


def test_neither_bundle_nor_registry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="name a bundle"):
        Service.open(None, None, tmp_path)
    with pytest.raises(BundleError, match="nothing was promoted yet"):
        Service.open(None, None, tmp_path, models=tmp_path / "none")


def test_a_bundle_serves_until_one_is_promoted(tiny_bundle: Path, tmp_path: Path, listen: Any) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    service = Service.open(tmp_path / "tiny", None, tmp_path / "state", models=tmp_path / "models")
    running, stop = listen(serve_with(service))
    try:
        assert running.client.get("/v1/models").json()["name"] == "tiny"
        pointer = ModelRegistry(tmp_path / "models").publish(tiny_bundle, 1, "first")
        until(
            lambda: running.client.get("/v1/models").json()["following"]["current"] == pointer.version, "it is followed"
        )
    finally:
        stop()
