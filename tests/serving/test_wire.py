"""What comes over the wire before there is a request: slow, endless, malformed, and too many at once."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving import limits, protocol

POST = b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def wire(server: Any) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        yield sock


def answer(sock: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the next answer."""
    with sock.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while (line := file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
        return status, headers, json.loads(body) if body else None


def asked(server: Any, head: bytes) -> tuple[int, dict[str, str], Any]:
    with wire(server) as sock:
        sock.sendall(head)
        return answer(sock)


def closes(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("host", ["[", "]", "[::1", "a b", "evil.com@127.0.0.1", 'localhost/"><x', "localhost:x"])
def test_a_host_that_is_no_name_is_refused(server: Any, host: str) -> None:
    status, headers, body = asked(server, f"GET /docs HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status == 421
    assert headers["content-type"] == body["type"].replace("/docs#problem-misdirected", "application/problem+json")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]", "[::1]:8080"])
def test_names_of_this_machine_are_answered(server: Any, host: str) -> None:
    assert asked(server, f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())[0] == 200


@pytest.mark.parametrize("origin", ["http://[", "null", "", "://", "http://evil.com"])
def test_an_origin_that_is_not_the_pages_own_is_refused(server: Any, origin: str) -> None:
    head = f"POST /playground/events HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nContent-Length: 0\r\n\r\n"
    with wire(server) as sock:
        sock.sendall(head.encode())
        assert sock.recv(100).split()[1] == b"403"


@pytest.mark.parametrize("path", ["/", "/docs", "/health/live", "/health/ready", "/metrics", "/openapi.json"])
def test_what_answers_get_answers_head_without_the_body(server: Any, path: str) -> None:
    head, get = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert server.client.head("/v1/rank").status_code == 405


def test_bytes_that_are_no_request_are_a_problem_too(server: Any) -> None:
    status, headers, body = asked(server, b"BREW / HTTP/1.1\r\n\r\n")
    assert (status, headers["content-type"], body["status"]) == (400, "application/problem+json", 400)


def test_a_body_that_is_no_body_is_answered_and_the_connection_closed(server: Any) -> None:
    with wire(server) as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert answer(sock)[0] == 400
        assert closes(sock)


@pytest.mark.parametrize(
    "endless",
    [b"X-Long: " + b"a" * 100_000, b"".join(b"X-%d: a\r\n" % n for n in range(10_000))],
    ids=["one header", "many headers"],
)
def test_a_head_without_end_is_cut_off(server: Any, endless: bytes) -> None:
    with wire(server) as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + endless)
        assert answer(sock)[0] == 431
        assert closes(sock)
    assert server.client.get("/health/live").status_code == 200


def test_a_head_that_comes_slowly_is_not_waited_for(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with wire(server) as silent, wire(server) as slow, wire(server) as second:
        second.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(second)[0] == 200
        second.sendall(b"GET /health")
        slow.sendall(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(400):  # a byte now and then buys no time
            slow.sendall(b"a")
            if select.select([slow], [], [], 0.05)[0]:
                break
        for sock in (silent, slow, second):
            assert answer(sock)[0] == 408
            assert closes(sock)


def test_a_request_that_takes_longer_than_its_head_may_is_answered(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    health = server.service.scorer.health
    monkeypatch.setattr(server.service.scorer, "health", lambda: (time.sleep(0.6), health())[1])
    assert asked(server, b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200


def test_a_body_that_comes_slowly_is_not_waited_for(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    status, _, body = asked(server, POST + b'Content-Length: 100\r\n\r\n{"items":')
    assert (status, body["type"]) == (408, "/docs#problem-too-slow")


def test_a_client_that_hangs_up_is_no_failure_of_the_server(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    def counted() -> float:
        name = 'plexrank_request_duration_seconds_count{method="POST",route="/v1/recommend",status="499"} '
        _, _, rest = server.client.get("/metrics").text.partition(name)
        return float(rest.partition("\n")[0] or 0)

    with wire(server) as sock:
        sock.sendall(POST.replace(b"rank", b"recommend") + b'Content-Length: 100\r\n\r\n{"user":')
        time.sleep(0.2)
    for _ in range(50):
        if counted():
            break
        time.sleep(0.1)
    assert counted() == 1
    assert "failed" not in caplog.text


def test_one_connection_too_many_is_told_to_come_back(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS", 4)
    open_ = [socket.create_connection(("127.0.0.1", server.port), 5) for _ in range(8)]
    time.sleep(0.3)
    status, headers, _ = answer(open_[-1])
    assert (status, headers["retry-after"]) == (503, "1")
    for sock in open_:
        sock.close()
    time.sleep(0.3)
    assert server.client.get("/health/live").status_code == 200
