"""Who is let in: a token, or nobody but this machine."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ServingConfig
from engine.errors import ConfigError
from serving.app import create_app
from serving.auth import Guard, check_address, is_loopback, token_from

TOKEN = "a-token-of-sufficient-length"


@pytest.fixture(scope="module")
def guarded(models: Path, tmp_path_factory: pytest.TempPathFactory, listen: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_TOKEN", TOKEN)
        app = create_app(models / "tiny", ServingConfig(token_env="TEST_TOKEN"), tmp_path_factory.mktemp("guarded"))
    running, stop = listen(app)
    yield running
    stop()


def test_without_the_token_nothing_but_health_is_answered(guarded: Any) -> None:
    for path in ("/", "/v1/users", "/metrics", "/docs", "/openapi.json", "/v1/nothing", "/static/app.css"):
        response = guarded.client.get(path)
        assert response.status_code == 401, path
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert guarded.client.get("/health/live").status_code == 200
    assert guarded.client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "Bearer wrong",
        "Bearer",
        f"Bearer {TOKEN}x",
        f"Token {TOKEN}",
        TOKEN,
        "Basic !!!",
        "Basic " + "A" * 999,
        "Bearer ü",
        "Basic ü",
    ],
)
def test_a_wrong_token_is_no_token(guarded: Any, given: str) -> None:
    response = guarded.client.get("/v1/users", headers={b"authorization": given.encode()})
    assert response.status_code == 401


def test_the_token_opens_everything_for_any_host(guarded: Any) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "host": "rank.example"}
    assert guarded.client.get("/v1/users", headers=headers).status_code == 200
    password = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    assert guarded.client.get("/v1/users", headers={"authorization": f"Basic {password}"}).status_code == 200
    assert guarded.client.get("/openapi.json", headers=headers).json()["security"] == [{"token": []}]


def test_the_token_is_not_kept_or_said(guarded: Any) -> None:
    guard = next(m.kwargs["guard"] for m in guarded.app.user_middleware if "guard" in m.kwargs)
    assert TOKEN not in repr(vars(guard))
    headers = {"authorization": f"Bearer {TOKEN}"}
    for path in ("/metrics", "/openapi.json", "/v1/plugins", "/v1/models", "/docs"):
        assert TOKEN not in guarded.client.get(path, headers=headers).text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    check_address(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "", "localhost.evil"])
def test_an_address_that_others_reach_needs_a_token_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="no token is set"):
        check_address(host, None, insecure=False)
    check_address(host, TOKEN, insecure=False)
    check_address(host, None, insecure=True)


def test_a_named_token_must_be_there_and_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="TEST_TOKEN holds 0 characters"):
        token_from("TEST_TOKEN")
    monkeypatch.setenv("TEST_TOKEN", "short")
    with pytest.raises(ConfigError, match="at least 16"):
        token_from("TEST_TOKEN")
    assert token_from(None) is None


def test_insecure_answers_any_host() -> None:
    assert Guard(None, any_host=True).knows_host("evil.example")
    assert not Guard(None).knows_host("evil.example")
    assert not Guard(None).knows_host("")
