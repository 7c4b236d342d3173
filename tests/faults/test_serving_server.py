"""The whole server under fault: full queues, broken bundles, dying stores and logs, restarts, swaps under load."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.bundle import Bundle
from engine.components import UserState
from engine.config import ServingConfig
from engine.errors import BundleError
from plugins.events.partition import Retention
from serving.app import create_app, serve_with
from serving.service import Service

ITEMS = [str(n) for n in range(30)]
LISTEN = Callable[[Any], tuple[Any, Callable[[], None]]]


def serve(app: Any) -> tuple[httpx.Client, Callable[[], None]]:
    """A real server on a free port."""
    import uvicorn

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30)

    def stop() -> None:
        client.close()
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()

    return client, stop


@pytest.fixture
def models(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder of its own with `tiny` and `next`, to break."""
    for name in ("tiny", "next"):
        shutil.copytree(tiny_bundle, tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[Any]:
    """(client, service) of a server with one scoring place and a queue of four."""
    config = ServingConfig.model_validate({"limits": {"timeout_ms": 2000, "queue": 4, "threads": 1}})
    service = Service.open(models / "tiny", config, tmp_path / "state")
    client, stop = serve(serve_with(service))
    yield client, service
    stop()


def click(client: httpx.Client, user: str, item: str, id_: str) -> httpx.Response:
    data = {"type": "click", "user": user, "item": item}
    return client.post("/v1/events", json={"id": id_, "source": "t", "type": "interaction", "data": data})


# ----------------------------------------------------------------------------------------------------- load
def test_a_full_queue_is_a_503_that_says_when_to_come_back(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server
    release = threading.Event()
    real = service.scorer.score

    def slow(request: Any) -> Any:
        release.wait(10)
        return real(request)

    monkeypatch.setattr(service.scorer, "score", slow)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.post, "/v1/rank", json={"items": ["1"], "timeout_ms": 3000}) for _ in range(12)]
        time.sleep(0.7)
        assert client.get("/health/live").status_code == 200, "the event loop turns"
        release.set()
        answers = [future.result() for future in asked]
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 5 + [503] * 7, "one at work, four waiting"
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["content-type"] == "application/problem+json"
    assert "plexrank_shed_total 7.0" in client.get("/metrics").text
    assert client.post("/v1/rank", json={"items": ["1"]}).json()["degraded"] == []


def test_the_deadline_of_a_request_is_kept_over_http(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server
    inside, release, left = threading.Event(), threading.Event(), threading.Event()

    def stall(request: Any) -> None:
        inside.set()
        release.wait(20)
        left.set()

    monkeypatch.setattr(service.scorer, "score", stall)
    try:
        answer = client.post("/v1/recommend", json={"count": 3, "timeout_ms": 200}).json()
        assert inside.is_set()
        assert not left.is_set(), "the answer is there while the scorer still stalls"
    finally:
        release.set()
    assert answer["degraded"] == ["rank: deadline"]
    assert len(answer["items"]) == 3
    assert 'plexrank_degraded_total{reason="rank"} 1.0' in client.get("/metrics").text


def test_a_dead_scorer_is_not_ready_but_still_answers(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server

    def dead(_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.scorer, "score", dead)
    monkeypatch.setattr(service.scorer, "health", lambda: dead(None))
    answer = client.post("/v1/rank", json={"items": ITEMS}).json()
    assert answer["degraded"] == ["rank: RuntimeError"]
    assert len(answer["items"]) == 30
    assert client.get("/health/ready").status_code == 503


# ------------------------------------------------------------------------------------------- store and log
def test_a_store_that_fails_degrades_rankings_and_keeps_events(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("store is down")

    with monkeypatch.context() as patch:
        patch.setattr(service.store, "get", down)
        patch.setattr(service.store, "append", down)
        answer = client.post("/v1/recommend", json={"user": "u1", "count": 3}).json()
        assert answer["degraded"] == ["state: ConnectionError"]
        assert len(answer["items"]) == 3
        response = click(client, "storeless", "1", "lost-1")
        assert response.status_code == 202
        assert response.json()["events"][0]["status"] == "accepted"
        assert response.json()["degraded"] == ["state: ConnectionError"]
    assert service.store.get("storeless").history == []
    service.intake.recover()  # as the next start does
    assert service.store.get("storeless").history == ["1"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/users"), ("GET", "/v1/users/u1"), ("DELETE", "/v1/users/u1"), ("GET", "/?user=u1")],
)
def test_a_store_that_fails_is_a_503_where_nothing_can_be_said_without_it(
    server: Any, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    client, service = server

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("secret-host:6379")

    for name in ("get", "users", "delete"):
        monkeypatch.setattr(service.store, name, down)
    answer = client.request(method, path)
    assert answer.status_code == 503
    assert "the state store does not do what it is asked (ConnectionError)" in answer.text
    assert "secret-host" not in answer.text


def test_what_can_be_forgotten_is_forgotten_when_the_store_fails(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server
    assert click(client, "gone", "1", "gone-1").status_code == 202
    request_id = client.post("/v1/rank", json={"user": "gone", "items": ITEMS}).json()["request_id"]
    monkeypatch.setattr(service.store, "delete", lambda _: (_ for _ in ()).throw(ConnectionError()))
    assert client.delete("/v1/users/gone").status_code == 503
    assert client.get(f"/v1/explain/{request_id}").status_code == 404
    assert service.log.erase("gone") == 0


def test_a_segment_that_cannot_be_begun_refuses_events_until_it_can(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = server
    assert click(client, "u1", "1", "roll-1").status_code == 202
    partition = service.log._partitions[0]
    monkeypatch.setattr(partition, "retention", Retention(1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plugins.events.partition.sync", full)
        response = click(client, "u1", "2", "roll-2")
        assert response.status_code == 503
        assert "No space left on device" in response.json()["detail"]
    assert click(client, "u1", "2", "roll-2").json()["events"][0] == {
        "id": "roll-2",
        "status": "accepted",
        "partition": 0,
        "offset": 1,
    }
    assert [record.offset for record in service.log.read({0: 0})] == [0, 1]


def test_a_full_disk_refuses_events_and_nothing_else(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = server

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("plugins.events.partition._write_all", full)
        response = click(client, "u1", "1", "full-1")
        assert response.status_code == 503
        assert "No space left on device" in response.json()["detail"]
        assert client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()["degraded"] == []
    again = click(client, "u1", "1", "full-1").json()["events"][0]
    assert again["status"] == "accepted", "what was not written is not a duplicate"


def test_restarts_keep_clicks_know_duplicates_and_do_not_bring_back_the_erased(models: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    event = {"source": "t", "type": "interaction", "data": {"type": "click", "user": "u1", "item": "29"}}
    first = Service.open(models / "tiny", None, state)
    assert first.receive([json.dumps({**event, "id": "once"}).encode()]).count("accepted") == 1
    known = first.store.get("u1").history
    assert known[0] == "29"
    assert len(known) > 1, "the bundle's users were put in"
    first.erase("u2")
    first.close()
    second = Service.open(models / "tiny", None, state)
    assert second.store.get("u1").history == known
    assert second.receive([json.dumps({**event, "id": "once"}).encode()]).count("duplicate") == 1
    assert second.store.get("u2") == UserState("u2")
    second.erase("u1")
    second.close()
    third = Service.open(models / "tiny", None, state)
    assert third.store.get("u1") == UserState("u1")
    assert list(third.log.read({0: 0})) == []
    third.close()


def test_a_second_server_on_one_state_directory_is_refused(server: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"process \d+ writes this event log"):
        Service.open(models / "tiny", None, tmp_path / "state")


# --------------------------------------------------------------------------------------------------- bundles
def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)


def edit_manifest(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["name"] = "renamed"
    (path / "manifest.json").write_text(json.dumps(manifest))


def lose_a_file(path: Path) -> None:
    (path / "vectors.safetensors").unlink()


def no_json(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\x00\xff{")


@pytest.mark.parametrize("breakage", [truncate, flip, edit_manifest, lose_a_file, no_json])
def test_a_broken_bundle_is_refused_and_the_one_before_goes_on(
    server: Any, models: Path, breakage: Callable[[Path], None]
) -> None:
    client, service = server
    before = client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()
    breakage(models / "next")
    response = client.post("/v1/models:load", json={"name": "next"})
    assert response.status_code == 422, response.text
    assert response.json()["type"] == "/docs#problem-unprocessable"
    assert "next" in response.json()["detail"]
    after = client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()
    assert after["items"] == before["items"]
    assert after["degraded"] == []
    assert client.get("/health/ready").status_code == 200
    assert service.path.name == "tiny"
    assert 'plexrank_bundle_loads_total{result="refused"} 1.0' in client.get("/metrics").text
    with pytest.raises(BundleError):
        Bundle.open(models / "next")


def test_a_bundle_that_is_overwritten_in_place_does_not_take_the_server_down(server: Any, models: Path) -> None:
    client, _ = server
    wanted = {"user": "u1", "items": ITEMS}
    before = client.post("/v1/rank", json=wanted).json()["items"]
    count = len(client.post("/v1/recommend", json={"user": "u1", "count": 5}).json()["items"])
    for path in (models / "tiny").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 3)
    assert client.post("/v1/models:load", json={"name": "tiny"}).status_code == 422
    answer = client.post("/v1/rank", json=wanted).json()
    assert (answer["items"], answer["degraded"]) == (before, [])
    found = client.post("/v1/recommend", json={"user": "u1", "count": 5}).json()
    assert (len(found["items"]), found["degraded"]) == (count, [])
    assert client.get(f"/v1/explain/{found['request_id']}").status_code == 200
    assert client.get("/v1/items/1").status_code == 200


@pytest.mark.parametrize("name", ["../tiny", "/etc", "tiny/../next", "..", "", "Tiny", "a" * 65, "tiny\x00", "none"])
def test_only_bundles_of_the_same_folder_can_be_named(server: Any, name: str) -> None:
    client, _ = server
    assert client.post("/v1/models:load", json={"name": name}).status_code in (404, 422)


def test_a_link_out_of_the_models_folder_is_not_followed(server: Any, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "next", tmp_path / "elsewhere")
    (models / "linked").symlink_to(tmp_path / "elsewhere")
    client, _ = server
    assert client.post("/v1/models:load", json={"name": "linked"}).status_code == 404


def test_swaps_under_load_lose_no_request_and_mix_no_answers(server: Any, models: Path) -> None:
    client, _ = server
    stop = threading.Event()
    codes: list[int] = []
    wrong: list[Any] = []
    expected = client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()["items"]

    def ask() -> None:
        with httpx.Client(base_url=client.base_url, timeout=30) as mine:
            while not stop.is_set():
                response = mine.post("/v1/rank", json={"user": "u1", "items": ITEMS, "timeout_ms": 20_000})
                codes.append(response.status_code)
                if response.json().get("degraded") or response.json().get("items") != expected:
                    wrong.append(response.json())

    old = client.post("/v1/recommend", json={"user": "u1", "count": 3}).json()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(6):
        response = client.post("/v1/models:load", json={"name": ("next", "tiny")[n % 2]})
        assert response.status_code == 200, response.text
    stop.set()
    for thread in threads:
        thread.join()
    assert set(codes) == {200}
    assert len(codes) > 20
    assert wrong == []
    explained = client.get(f"/v1/explain/{old['request_id']}").json()
    assert [reason["item"] for reason in explained["items"]] == [item["id"] for item in old["items"]]
    assert client.get("/v1/models").json()["name"] == "tiny"
    assert client.get("/v1/models").json()["available"] == ["next", "tiny"]


def test_two_loads_at_once_are_a_conflict(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = server
    real, inside = service.scorer.load, threading.Event()

    def slow(path: Path) -> None:
        inside.set()
        time.sleep(0.5)
        real(path)

    monkeypatch.setattr(service.scorer, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/models:load", json={"name": "next"})
        inside.wait(10)
        second = client.post("/v1/models:load", json={"name": "next"})
        assert second.status_code == 409
        assert first.result().status_code == 200


# -------------------------------------------------------------------------------------------------- process
@pytest.mark.slow
def test_the_command_serves_reloads_on_hangup_and_drains_on_term(models: Path, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "engine", "serve", str(models / "tiny"), "--port", str(port)]
    command += ["--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        for _ in range(600):
            try:
                if client.get("/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
        before = client.get("/v1/models").json()["since"]
        assert "plexrank_bundle_loads_total{" not in client.get("/metrics").text
        assert click(client, "u1", "3", "cli-1").status_code == 202
        process.send_signal(signal.SIGHUP)
        for _ in range(100):
            if client.get("/v1/models").json()["since"] > before:
                break
            time.sleep(0.1)
        assert client.get("/v1/models").json()["since"] > before
        truncate(models / "tiny")
        process.send_signal(signal.SIGHUP)
        for _ in range(100):
            if 'bundle_loads_total{result="refused"}' in client.get("/metrics").text:
                break
            time.sleep(0.1)
        figures = client.get("/metrics").text
        assert 'plexrank_bundle_loads_total{result="loaded"} 1.0' in figures
        assert 'plexrank_bundle_loads_total{result="refused"} 1.0' in figures
        assert client.post("/v1/rank", json={"user": "u1", "items": ITEMS}).json()["degraded"] == []
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "the bundle is refused, the one before goes on" in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_an_application_made_by_the_factory_serves(models: Path, tmp_path: Path) -> None:
    app = create_app(models / "tiny", None, tmp_path / "made")
    client, stop = serve(app)
    assert client.get("/health/ready").status_code == 200
    stop()
