"""`plexrank rank` and `recommend`: one answer without a server, the same as the server's."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine.cli import build
from engine.errors import ConfigError, PlexrankError
from serving import cli


def call(*arguments: str) -> Any:
    return CliRunner().invoke(build(list(arguments)), list(arguments))


def test_a_ranking_in_json_is_the_answer_of_the_route(tiny_bundle: Path) -> None:
    result = call("rank", str(tiny_bundle), "--user", "u1", "--items", "1, 2,unknown", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert {item["id"] for item in answer["items"]} == {"1", "2", "unknown"}
    assert answer["degraded"] == []
    assert answer["model"]["name"] == "tiny"


def test_recommendations_for_people_have_titles(tiny_bundle: Path) -> None:
    result = call("recommend", str(tiny_bundle), "--user", "u1", "--count", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Film <") == 3


def test_the_history_of_the_bundles_users_counts(tiny_bundle: Path) -> None:
    known, stranger = (
        json.loads(call("rank", str(tiny_bundle), "--user", user, "--items", "1,2,3", "--json").stdout)
        for user in ("u1", "stranger")
    )
    assert known["items"] != stranger["items"]


@pytest.mark.parametrize(
    "arguments",
    [("rank", "/no/such/bundle", "--items", "1"), ("recommend",), ("recommend", ".", "--count", "0"), ("serve",)],
)
def test_wrong_usage_is_exit_two(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlexrankError, match="manifest"):
        cli.recommend(tmp_path)


def test_an_open_address_is_refused_before_anything_listens(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.cli.uvicorn.Server", lambda *_, **__: pytest.fail("it listens"))
    with pytest.raises(ConfigError, match="no token is set"):
        cli.serve(tiny_bundle, host="0.0.0.0", state_dir=tmp_path)
    cli.recommend(tiny_bundle)  # and what was opened is closed again
    assert isinstance(build(["serve"]), typer.Typer)


def test_a_port_that_is_taken_is_named_with_its_remedy(tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1: Address already in use.*--port"):
            cli.serve(tiny_bundle, port=port, state_dir=tmp_path)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_of_this_machine_is_refused(tiny_bundle: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        cli.serve(tiny_bundle, host=host, port=0, insecure=True, state_dir=tmp_path)
