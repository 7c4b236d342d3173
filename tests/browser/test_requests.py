"""What the Playground answers to requests that no good page sends, and the arithmetic of what it shows."""

from __future__ import annotations

import re
import shlex

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from film_world import FilmConsole

from engine.errors import RequestError
from serving import ranking_view as view
from serving.playground import Playground, curl, router

ORIGIN = "http://testserver"
CLICK = {"user": "196", "item": "3", "request_id": "r", "shown": "[]"}


@pytest.fixture
def console() -> FilmConsole:
    return FilmConsole()


@pytest.fixture
def client(console: FilmConsole) -> TestClient:
    app = FastAPI()
    app.include_router(router(Playground(console)))
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver.evil.example"},
        {"sec-fetch-site": "cross-site", "origin": ORIGIN},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
def test_a_click_from_another_site_is_refused_and_changes_nothing(client, console, headers):
    answer = client.post("/playground/events", data=CLICK, headers=headers)
    assert answer.status_code == 403
    assert len(console.user("196").history) == 3


@pytest.mark.parametrize("headers", [{"origin": ORIGIN}, {"sec-fetch-site": "same-origin"}])
def test_a_click_of_the_page_itself_is_taken(client, console, headers):
    answer = client.post("/playground/events", data=CLICK, headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, "/?user=196")
    assert console.user("196").history[0] == "3"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"user=196", 422),
        (b"user=&item=3", 422),
        (b"user=%ff&item=%ff", 400),
        (b"\xff\xfe", 400),
        (b"&".join(b"a=1" for _ in range(30)), 400),
        (b"user=196&item=3&shown=" + b"x" * 70_000, 413),
    ],
)
def test_a_malformed_form_is_refused_by_status(client, body, status):
    answer = client.post("/playground/events", content=body, headers={"origin": ORIGIN})
    assert answer.status_code == status
    assert "<h1>" in answer.text


@pytest.mark.parametrize("shown", ["", "null", "{}", "[[1]]", "[1]", "[" * 5000, '[["3", "x"]]', '[["3", 0.5, 1]]'])
def test_a_list_before_that_nobody_showed_counts_as_no_list(client, shown):
    answer = client.post(
        "/playground/events", data={**CLICK, "shown": shown}, headers={"origin": ORIGIN, "hx-request": "true"}
    )
    assert answer.status_code == 200
    assert 'class="new"' not in answer.text


def test_a_refused_request_keeps_its_status_and_words(client, console):
    console.fails = RequestError("at most 256 bytes an id", status=422)
    answer = client.get("/", params={"user": "u" * 300})
    assert answer.status_code == 422
    assert "at most 256 bytes an id" in answer.text


def test_every_page_forbids_inline_and_foreign_content_and_has_none(client):
    for path in ("/", "/?user=196", "/?user=", "/playground/users?user=1"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<script(?![^>]* src=\"/static/)|<style|\sstyle=|\son\w+=\"|javascript:", answer.text)
        assert not re.findall(r"(?:src|href|action)=\"(?:https?:)?//", answer.text)


def test_static_files_are_a_fixed_set(client):
    page = client.get("/").text
    for address in set(re.findall(r"\"(/static/[^\"]+)\"", page)):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert "immutable" in answer.headers["cache-control"]
    for name in ("nothing.js", "..%2fplayground.py", "%2e%2e/playground.py"):
        assert client.get(f"/static/{name}").status_code == 404
    assert client.get("/static/LICENSE.htmx").text.startswith("Zero-Clause BSD")


def test_an_empty_state_store_asks_for_a_user(client, console):
    console.states.clear()
    page = client.get("/").text
    assert "Choose a user" in page
    assert "No users yet" in page


def test_the_curl_line_survives_the_shell_whatever_the_user_is_called():
    line = curl("http://h:1", "/v1/recommend", {"user": 'o\'Neil $(id) `x` "q" 用户'}, "TOKEN")
    words = shlex.split(line)
    assert words[:3] == ["curl", "-s", "http://h:1/v1/recommend"]
    assert words[-1] == '{"user":"o\'Neil $(id) `x` \\"q\\" 用户"}'
    assert words[words.index("-H", 5) + 1] == "Authorization: Bearer $TOKEN"


def test_an_item_that_only_closes_the_gap_has_not_moved():
    # a, b, c, d; a is clicked and goes; c overtakes b; e is new.
    assert view.moves(["a", "b", "c", "d"], ["c", "b", "e", "d"]) == {"c": 1, "b": -1, "d": 0}


def test_weights_become_shares_of_the_sum_and_bars_of_the_largest():
    weights = view.weigh([("a", 0.6), ("b", -0.3), ("c", 0.1), ("d", float("nan"))], {})
    assert [round(w.share, 6) for w in weights] == [0.6, 0.3, 0.1, 0.0]
    assert [w.value for w in weights] == [0.6, -0.3, 0.1, 0.0]
    assert [round(w.bar, 6) for w in weights] == [1.0, 0.5, round(1 / 6, 4), 0.0]


def test_stage_times_lie_behind_one_another():
    pieces = view.stages({"retrieve": 1.0, "rank": 3.0}, took_ms=4.01)
    assert [(p.name, p.offset, p.share) for p in pieces] == [("retrieve", 0.0, 0.25), ("rank", 0.25, 0.75)]
    pieces = view.stages({"retrieve": 1.0, "rank": 3.0}, took_ms=8.0)
    assert [(p.name, p.offset, p.share) for p in pieces][1:] == [("rank", 0.125, 0.375), ("other", 0.5, 0.5)]
