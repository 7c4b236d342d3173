"""`plexrank init` writes a project whose own tests pass as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import PlexrankError
from engine.scaffold import create_project


def test_the_tests_of_a_new_project_pass(tmp_path: Path) -> None:
    folder = tmp_path / "My Shop 2"
    files = create_project(folder)
    assert files == ["README.md", "config.yaml", "my_shop_2_plugin.py", "pyproject.toml", "tests/test_plugin.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


def test_no_placeholder_is_left(tmp_path: Path) -> None:
    for name in create_project(tmp_path / "shop"):
        assert "$" not in (tmp_path / "shop" / name).read_text()


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(PlexrankError, match="not an empty folder"):
        create_project(tmp_path)
    with pytest.raises(PlexrankError, match="not an empty folder"):
        create_project(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    assert "config.yaml" in create_project(tmp_path / "shop")


@pytest.mark.parametrize("name", ["1st", "...", "用户"])
def test_a_name_that_cannot_be_a_module_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlexrankError, match="starts with a letter"):
        create_project(tmp_path / name)
