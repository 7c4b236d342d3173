"""The command line: results on stdout, the reason of a failure in one line on stderr, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import cli
from engine.commands import output
from engine.errors import BundleError, SchemaError
from engine.loading import load_config
from tests.platform.support import MINIMAL, write

ROOT = Path(__file__).parents[2]


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Answer]


@pytest.fixture
def plexrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["plexrank", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        return Answer(code or 0, *capsys.readouterr())

    return run


def test_help_answers_without_torch() -> None:
    """The machine that lists commands need not load 200 MB; other packages' commands are held to it too."""
    code = (
        "import sys; sys.argv = ['plexrank', '--help']\n"
        "from engine import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchrec', 'pyarrow', 'numpy', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for command in ("train", "compare", "validate", "plugins", "doctor", "init", "bundle", "version"):
        assert command in run.stdout


def test_the_version_is_that_of_the_distribution(plexrank: Command) -> None:
    assert plexrank("version", "--json").json == {"plexrank": version("plexrank")}
    assert plexrank("version").out == f"plexrank {version('plexrank')}\n"


def test_plugins_are_a_list_of_objects_with_kind_and_name(plexrank: Command) -> None:
    rows = plexrank("plugins", "--json").json
    din = next(row for row in rows if (row["kind"], row["name"]) == ("interests", "din"))
    assert (din["distribution"], din["version"]) == ("plexrank", version("plexrank"))
    assert "hidden" in din["options"]
    assert {row["kind"] for row in plexrank("plugins", "--kind", "rankers", "--json").json} == {"rankers"}
    assert "Deep interest network" in plexrank("plugins", "--kind", "interests").out


def test_wrong_usage_ends_with_2(plexrank: Command) -> None:
    assert plexrank("no-such-command").code == 2
    assert plexrank("train").code == 2
    assert plexrank("plugins", "--kind", "interest").code == 2
    assert plexrank("train", "x.yaml", "--set", "epochs").code == 2
    assert plexrank("compare", "x.yaml", "--vary", "interest.name").code == 2


def test_a_wrong_configuration_ends_with_1_and_its_line(plexrank: Command, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("of: item_id", "of: itm"))
    answer = plexrank("validate", path)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == f"{path}:8: features[2].of: no feature named 'itm'; did you mean 'item_id'?\n"


def test_a_right_configuration_ends_with_0(plexrank: Command, tmp_path: Path) -> None:
    answer = plexrank("validate", write(tmp_path, MINIMAL), "--json")
    assert answer.code == 0
    assert answer.json["ok"] is True
    assert answer.json["checks"][0]["status"] == "PASS"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_of_the_repository_is_right(config: Path) -> None:
    assert load_config(config).name == config.stem


def test_data_that_fails_ends_with_1(plexrank: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        SimpleNamespace(name="label", status="WARN", detail="rare"),
        SimpleNamespace(name="user", status="FAIL", detail="none"),
    ]
    monkeypatch.setattr("engine.data.validate.check_data", lambda config, plugins: checks)
    path = write(tmp_path, MINIMAL)
    assert plexrank("validate", path, "--data").code == 1
    answer = plexrank("validate", path, "--data", "--json")
    assert (answer.code, answer.json["ok"]) == (1, False)
    assert [check["status"] for check in answer.json["checks"]] == ["PASS", "WARN", "FAIL"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the training: keeps what it was asked."""
    asked: list[dict[str, Any]] = []

    def run_training(config: Any, out: Path, **rest: Any) -> dict[str, Any]:
        asked.append({"config": config, "out": out, **rest})
        rest["progress"]("training; epoch 1", 1.0)
        return {"auc": 0.5, "gauc": float("nan"), "rows": {"train": 3}}

    monkeypatch.setattr("engine.train_command.run_training", run_training)
    return asked


def test_train_prints_one_json_object_last(plexrank: Command, tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    path = write(tmp_path, MINIMAL)
    answer = plexrank("train", path, "--out", tmp_path / "run", "--seed", 7, "--set", "training.epochs=2", "--json")
    assert answer.out == '{"auc": 0.5, "gauc": null, "rows": {"train": 3}}\n'
    assert "training; epoch 1" in answer.err
    (asked,) = trained
    assert (asked["config"].seed, asked["config"].training.epochs) == (7, 2)
    assert (asked["out"], asked["resume"]) == (tmp_path / "run", False)


def test_only_the_first_process_of_torchrun_prints(
    plexrank: Command, tmp_path: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = plexrank("train", write(tmp_path, MINIMAL), "--json")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_errors_of_the_data_get_the_line_of_their_key(
    plexrank: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_training(*_: Any, **__: Any) -> None:
        raise SchemaError("features[1].column: no column 'item_id'")

    monkeypatch.setattr("engine.train_command.run_training", run_training)
    path = write(tmp_path, MINIMAL)
    assert plexrank("train", path).err == f"{path}:7: features[1].column: no column 'item_id'\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BundleError("x: truncated"), "x: truncated\n"),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied\n"),
        (RuntimeError("boom"), "unexpected RuntimeError: boom (PLEXRANK_DEBUG=1 shows where)\n"),
    ],
)
def test_a_failure_is_one_line_without_a_traceback(
    plexrank: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("engine.doctor.examine", fail)
    answer = plexrank("doctor")
    assert (answer.code, answer.out, answer.err) == (1, "", expected)


def test_a_traceback_is_there_for_who_asks(plexrank: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLEXRANK_DEBUG", "1")
    monkeypatch.setattr("engine.doctor.examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plexrank("doctor")


def test_another_package_brings_a_command(plexrank: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_cli.py").write_text("def greet(name: str) -> None:\n    'Greets.'\n    print('hello', name)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        EntryPoint("greet", "acme_cli:greet", cli.COMMANDS_GROUP),
        EntryPoint("broken", "acme_no_such:x", cli.COMMANDS_GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    assert plexrank("greet", "you").out == "hello you\n"
    broken = plexrank("broken")
    assert broken.code == 1
    assert "command 'broken' (acme_no_such:x) cannot be imported" in broken.err
    listed = plexrank("--help").out
    assert "Greets." in listed
    assert "Broken: acme_no_such:x cannot be read" in listed


def test_json_has_no_numbers_that_json_lacks() -> None:
    import numpy as np

    value = {"a": float("inf"), "b": [np.float32(0.5), np.array([1, 2])], "c": Path("x"), 3: (True, None)}
    assert output.plain(value) == {"a": None, "b": [0.5, [1, 2]], "c": "x", "3": [True, None]}


def test_progress_off_a_terminal_is_a_line_where_a_stage_begins_and_one_where_it_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with output.Progress() as progress:
        for loss in (0.9, 0.5, 0.4):
            progress(f"training; loss {loss}", 0.5)
        progress("data ready", 1.0)
        progress("run 1 of 2, mean", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "training ...", "training; loss 0.4", "data ready", "run 1 of 2, mean ...", "run 1 of 2, mean",
    ]  # fmt: skip


def test_a_long_stage_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))  # ten seconds pass between two looks at the clock
    monkeypatch.setattr(output.time, "monotonic", lambda: float(next(clock)))
    with output.Progress() as progress:
        for step in range(8):
            progress(f"training; step {step}", step / 10)
    told = [line for line in capsys.readouterr().err.splitlines() if line.endswith("%")]
    assert told == ["training; step 3: 30%", "training; step 6: 60%"]
