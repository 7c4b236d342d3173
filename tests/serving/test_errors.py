"""Every way to ask wrongly has its own problem document, and none is a 500."""

from __future__ import annotations

import json
import random
import socket
from typing import Any

import pytest

JSON = {"content-type": "application/json"}


def check(response: Any, status: int) -> dict[str, Any]:
    """The problem document, which is the same whatever raised it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance", "request_id"} <= set(problem)
    assert set(problem) <= {"type", "title", "status", "detail", "instance", "request_id", "errors"}
    assert problem["type"].startswith("/docs#problem-")
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return problem


def post(server: Any, body: Any, path: str = "/v1/rank", **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.client.post(path, content=content, headers=JSON | headers)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"items":["1"],}',
        b'{"items":["\xff"]}',
        b'{"items":["\\ud800"]}',
        b'{"items":[NaN]}',
        b'{"items":["1"],"features":{"x":Infinity}}',
        b'{"items":["1"]}{"items":["1"]}',
        b"[" * 50_000,
        b'{"items":' + b"[" * 50_000,
    ],
)
def test_a_body_that_is_not_json_is_malformed(server: Any, body: bytes) -> None:
    depth = body.endswith(b"[" * 1000)  # an array where an object or an id belongs: it is not read to its end
    assert check(post(server, body), 422 if depth else 400)


NESTED: Any = 1
for _ in range(100):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "", "missing required field `items`"),
        ([], "", "Expected `object`, got `array`"),
        (None, "", "Expected `object`, got `null`"),
        ({"items": "1"}, "/items", "Expected `array`, got `str`"),
        ({"items": [1.5]}, "/items/0", "got `float`"),
        ({"items": ["1", None]}, "/items/1", "got `null`"),
        ({"items": ["1", ""]}, "/items/1", "length >= 1"),
        ({"items": ["1", "x" * 257]}, "/items/1", "longer than 256 bytes"),
        ({"items": ["ü" * 129]}, "/items/0", "longer than 256 bytes"),
        ({"items": ["a\x00b"]}, "/items/0", "control characters"),
        ({"items": [2**64]}, "/items/0", ""),
        ({"items": [{"features": {}}]}, "/items/0", "missing required field `id`"),
        ({"items": [{"id": "1", "featurs": {}}]}, "/items/0", "unknown field `featurs`"),
        ({"items": ["1"], "usr": "u"}, "", "unknown field `usr`"),
        ({"items": ["1"], "user": ""}, "/user", "length >= 1"),
        ({"items": ["1"], "user": "x" * 300}, "/user", "longer than 256 bytes"),
        ({"items": ["1"], "user": True}, "/user", "got `bool`"),
        ({"items": ["1"], "history": ["a\nb"]}, "/history/0", "control characters"),
        ({"items": ["1"], "history": ["1"] * 2001}, "/history", "2001 ids are more than 2000"),
        ({"items": ["1"], "timeout_ms": 0}, "/timeout_ms", ">= 1"),
        ({"items": ["1"], "timeout_ms": 60_001}, "/timeout_ms", "<= 60000"),
        ({"items": ["1"], "features": {"age": {}}}, "/features", "got `object`"),
        ({"items": ["1"], "features": {"x": NESTED}}, "/features", ""),
        (
            {"items": ["1"], "features": {"user": "u"}},
            "/features/user",
            "no user feature 'user'; did you mean 'user_id'",
        ),
        ({"items": ["1"], "features": {"genres": "war"}}, "/features/genres", "no user feature 'genres'"),
        ({"items": ["1"], "context": {"hour": 3}}, "/context/hour", "no user feature 'hour'"),
        ({"items": ["1"], "item_features": {"yaer": [1]}}, "/item_features/yaer", "did you mean 'year'"),
        ({"items": ["1"], "item_features": {"year": [1, 2]}}, "/item_features/year", "2 values for 1 items"),
        ({"items": ["1"], "item_features": {"year": ["abc"]}}, None, "year"),
        ({"items": ["1"], "item_features": {"year": [[1, 2]]}}, None, "year"),
        ({"items": ["1"], "item_features": {"year": [2**63]}}, "/item_features", ""),
    ],
)
def test_a_body_that_does_not_fit_says_where_and_what(server: Any, body: Any, pointer: Any, detail: str) -> None:
    problem = check(post(server, body), 422)
    assert detail in problem["detail"]
    if pointer:
        assert problem["errors"][0]["pointer"].startswith(pointer)


@pytest.mark.parametrize(
    "body",
    [{"count": 0}, {"count": 501}, {"count": "5"}, {"exclude": ["x" * 300]}, {"exclude": [""]}, {"items": ["1"]}],
)
def test_recommend_has_limits_of_its_own(server: Any, body: Any) -> None:
    check(post(server, body, "/v1/recommend"), 422)


@pytest.mark.parametrize("value", [1e308, -1e308, -0.0, 2**63 - 1, -(2**63), True, None, "1995", "", [], [None]])
def test_extreme_values_are_answered_without_a_500(server: Any, value: Any) -> None:
    for name in ("year", "genres"):
        response = post(server, {"items": ["1"], "item_features": {name: [value]}})
        assert response.status_code in (200, 422), response.text
        if response.status_code == 200:
            assert 0 <= response.json()["items"][0]["score"] <= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/rank", 405),
        ("DELETE", "/v1/events", 405),
        ("PUT", "/health/live", 405),
        ("PATCH", "/v1/users/u1", 405),
        ("GET", "/v1/users/", 422),
        ("GET", "/v1/users/nobody-here", 404),
        ("GET", "/v1/users/a%00b", 422),
        ("DELETE", "/v1/users/" + "x" * 300, 422),
        ("GET", "/v1/items/none", 404),
        ("GET", "/v1/explain/none", 404),
        ("GET", "/v1/explain/none?items=0", 422),
        ("GET", "/v1/explain/none?items=abc", 422),
        ("GET", "/v1/users?limit=-1", 422),
        ("GET", "/static/../app.py", 404),
        ("GET", "/v1/users/%ff%fe", 404),
    ],
)
def test_the_frameworks_own_errors_are_problems_too(server: Any, method: str, path: str, status: int) -> None:
    response = server.client.request(method, path)
    if path.startswith("/static"):
        assert response.status_code == 404
        return
    problem = check(response, status)
    if status == 405:
        assert response.headers["allow"]
    if "items=0" in path:
        assert problem["errors"][0]["pointer"] == "/query/items"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml"])
def test_only_json_is_taken_so_no_form_of_another_site_is(server: Any, kind: str) -> None:
    for path in ("/v1/rank", "/v1/recommend", "/v1/events", "/v1/models:load"):
        headers = {"content-type": kind} if kind else {}
        response = server.client.post(path, content=b'{"items":["1"]}', headers=headers)
        check(response, 415)


def test_the_type_may_have_parameters_and_capitals(server: Any) -> None:
    assert post(server, {"items": ["1"]}, **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_a_compressed_body_is_not_taken(server: Any) -> None:
    check(post(server, b"\x1f\x8b", **{"content-encoding": "gzip"}), 415)


def test_a_body_over_a_mebibyte_is_too_large_however_it_comes(server: Any) -> None:
    body = b'{"items":["' + b"x" * (1 << 20) + b'"]}'
    check(post(server, body), 413)

    def chunks() -> Any:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    check(server.client.post("/v1/rank", content=chunks(), headers=JSON), 413)
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:  # a length that lies
        head = f"POST /v1/rank HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 99999999999\r\n\r\n{{".encode())
        assert b" 413 " in sock.recv(4096)


def test_a_header_that_is_no_timeout_is_refused(server: Any) -> None:
    for value in ("-1", "0", "abc", "1e3", "99999999", "٣"):
        response = server.client.post("/v1/rank", json={"items": ["1"]}, headers={b"x-timeout-ms": value.encode()})
        check(response, 400)
    assert server.client.post("/v1/rank", json={"items": ["1"]}, headers={"x-timeout-ms": "5000"}).status_code == 200


def test_a_page_of_another_site_may_not_change_anything(server: Any) -> None:
    for site in ("cross-site", "same-site"):
        check(post(server, {"items": ["1"]}, **{"sec-fetch-site": site}), 403)
        check(server.client.delete("/v1/users/x", headers={"sec-fetch-site": site}), 403)
    assert post(server, {"items": ["1"]}, **{"sec-fetch-site": "same-origin"}).status_code == 200


def test_without_a_token_only_names_of_this_machine_are_answered(server: Any) -> None:
    check(server.client.get("/v1/users", headers={"host": "evil.example"}), 421)
    check(server.client.get("/v1/users", headers={"host": "127.0.0.1.evil.example"}), 421)
    for host in ("localhost:1", "127.0.0.1", "[::1]:8080", "127.8.8.8"):
        assert server.client.get("/v1/users", headers={"host": host}).status_code == 200


def test_an_unexpected_error_is_a_500_that_gives_nothing_away(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret path /etc/shadow")

    monkeypatch.setattr(server.service, "names", broken)
    problem = check(server.client.get("/v1/models"), 500)
    assert "secret" not in json.dumps(problem)


def test_random_bytes_to_every_parser_are_a_4xx(server: Any) -> None:
    rng = random.Random(7)
    whole = b'{"user":"u1","items":["1",{"id":"2","features":{"year":3}}],"item_features":{"genres":["war",null]}}'
    for _ in range(150):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        for path in ("/v1/rank", "/v1/recommend", "/v1/events", "/v1/models:load"):
            for content in (bytes(body), rng.randbytes(rng.randrange(64))):
                response = server.client.post(path, content=content, headers=JSON)
                assert response.status_code in (200, 400, 422), (path, content, response.text)


def test_bytes_that_are_no_http_close_the_connection_and_nothing_else(server: Any) -> None:
    rng = random.Random(9)
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            sock.sendall(rng.randbytes(200) + b"\r\n\r\n")
            sock.settimeout(5)
            try:
                answer = sock.recv(4096)
            except ConnectionError:
                continue
            assert answer == b"" or b" 400 " in answer
    assert server.client.get("/health/live").status_code == 200
