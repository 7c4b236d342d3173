"""Arrows go one way, and nothing that is loaded can run code: read from the sources, not from a run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "plugins", "models", "serving")
LOADERS_OF_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def sources(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_engine_imports_no_plugin_no_model_and_no_server() -> None:
    wrong = [
        f"{path}: {name}"
        for path, tree in sources("engine")
        for name in imported(tree)
        if name.split(".")[0] in ("plugins", "models", "serving")
    ]
    assert wrong == []


def test_plugins_and_models_do_not_know_the_server() -> None:
    wrong = [
        f"{path}: {name}"
        for path, tree in sources("plugins", "models")
        for name in imported(tree)
        if name.startswith("serving")
    ]
    assert wrong == []


def test_the_engine_names_no_plugin() -> None:
    """No string of the engine's code is the name of a built-in plugin; defaults are entry points.

    Docstrings may give examples. Names that are plain words of the engine's own too, such as the `mean` of a metric,
    cannot be told apart and are let through.
    """
    names = {point.name.partition(".")[2] for point in entry_points(group="plexrank")}
    own_words = {"mean", "full", "exact", "local", "attention", "hashing", "recent", "popular", "retriever", "mixed"}
    wrong = []
    for path, tree in sources("engine"):
        if path.startswith("engine/doctor/"):  # looks for Redis and Triton servers, plugin or not
            continue
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        wrong += [
            f"{path}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and id(node) not in docstrings and node.value in names - own_words
        ]
    assert wrong == []


def test_no_module_that_can_run_code_from_a_file_is_imported() -> None:
    wrong = [
        f"{path}: {name}"
        for path, tree in sources(*PACKAGES)
        for name in imported(tree)
        if name.split(".")[0] in LOADERS_OF_CODE
    ]
    assert wrong == []


@pytest.mark.parametrize("call", ["torch.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"])
def test_no_call_that_can_run_code_from_a_file_is_made(call: str) -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call
    ]
    assert wrong == []


def test_numpy_never_reads_objects() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert wrong == []
