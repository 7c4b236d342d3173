"""deploy/ cannot run in the tests: its files are linted, and the commands and configurations in them are real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from engine.cli import build
from engine.commands.training import overrides_of
from engine.loading import load_config
from engine.plugins import installed

BIN = Path(sys.executable).parent
COMPOSE, WITH_TRITON = Path("compose.yaml"), Path("deploy/compose.triton.yaml")
MANIFEST = Path("deploy/kubernetes.yaml")


def linted(*command: str) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ngc"])
def test_dockerfiles_are_clean(name: str) -> None:
    linted("hadolint", f"deploy/{name}")


def test_compose_files_fit_the_specification() -> None:
    linted("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE), str(WITH_TRITON))


def test_the_manifest_fits_kubernetes() -> None:
    linted("kubernetes-validate", "--strict", "--quiet", str(MANIFEST))


def pods() -> dict[str, dict[str, Any]]:
    """name -> its only container."""
    found = {}
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        if document["kind"] in ("Deployment", "StatefulSet"):
            (container,) = document["spec"]["template"]["spec"]["containers"]
            found[document["metadata"]["name"]] = container
    return found


def services(*files: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, service in yaml.safe_load(file.read_text())["services"].items():
            found[name] = {**found.get(name, {}), **service}
    return found


def parsed(words: list[str]) -> None:
    """The words are read as on a command line; the command itself is not run."""
    command: Any = typer.main.get_command(build(words))
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, words)


@pytest.mark.parametrize("name", ["gateway", "learner", "triton"])
def test_pods_run_commands_that_there_are(name: str) -> None:
    parsed(pods()[name]["args"])


@pytest.mark.parametrize("name", ["server", "learner"])
def test_services_run_commands_that_there_are(name: str) -> None:
    command = services(COMPOSE)[name]["command"]
    parsed(command.split() if isinstance(command, str) else command)


def test_every_pod_is_bounded_and_probed() -> None:
    for name, container in pods().items():
        assert set(container["resources"]) == {"requests", "limits"}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for name, probe in (("gateway", "httpGet"), ("triton", "exec")):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe in pods()[name][kind]
    parsed(pods()["triton"]["readinessProbe"]["exec"]["command"][1:])


def test_with_triton_the_bundle_asks_the_service_that_is_started() -> None:
    there = services(COMPOSE, WITH_TRITON)
    (command,) = there["train"]["command"]
    told = [part.split("'")[0] for part in command.split("--set '")[1:]]
    config = load_config(Path("configs/movielens-100k.yaml"), overrides_of(told, None))
    assert config.serving.event_log.options["bootstrap_servers"] == ["kafka:9092"]
    scorer = config.serving.scorer
    options = installed().get("scorers", scorer.name).Options(**scorer.options)
    assert options.url.split(":")[0] in there
    assert options.fallback == "inproc"
    assert there["triton"]["shm_size"] == "1g"
